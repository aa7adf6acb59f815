"""The launcher against a fake driver that knows every allocation: order, arguments, sizes, lifetimes, capture."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda, Misuse, write_kernels

from headfold.plugins.attention import cuda_launch
from headfold.plugins.attention.cuda_launch import (
    DriverError,
    Kernels,
    LaunchError,
    NoDevice,
    NoDriver,
    NoKernel,
    open_driver,
)
from headfold.plugins.attention.kernel_contract import (
    PARAMETERS,
    KernelFileError,
    KernelSpec,
    parameters,
    workspace_bytes,
)
from headfold.plugins.attention.launcher import Pointers, Shape

SPEC = KernelSpec(num_heads=9, kv_num_heads=3, head_dim=64, rotary_dim=64, dtype="float16", cache_dtype="float16")
NUMBERS = {"scale": 0.125, "window": -1, "epsilon": 1e-6}


class Bench:
    """Kernels on a fake GPU, and the memory of one call."""

    def __init__(
        self, directory: Path, spec: KernelSpec = SPEC, batch: int = 2, new: int = 1, capacity: int = 512, **kinds
    ) -> None:
        self.cuda = FakeCuda(write_kernels(directory, spec, **kinds), batch=batch)
        self.kernels = Kernels(directory, driver=self.cuda)
        self.shape = Shape(batch, new, capacity)
        self.stream = self.cuda.cuStreamCreate(0)[1]
        q, kv = batch * new * spec.num_heads * spec.head_dim * 2, batch * new * spec.kv_num_heads * spec.head_dim * 2
        cache, table = batch * spec.kv_num_heads * capacity * spec.head_dim * 2, capacity * spec.rotary_dim
        sizes = {"query": q, "key": kv, "value": kv, "present_key": cache, "present_value": cache, "output": q}
        sizes |= {"past_lengths": batch * 8, "cos_cache": table, "sin_cache": table}
        if spec.qk_norm:
            sizes |= {"q_norm_weight": spec.head_dim * 2, "k_norm_weight": spec.head_dim * 2}
        self.pointers = Pointers(**{name: self.cuda.cuMemAlloc(size)[1] for name, size in sizes.items()})
        self.needed = workspace_bytes(spec, batch, new, capacity)
        self.workspace = self.cuda.cuMemAlloc(self.needed)[1] if self.needed else 0

    def launch(self, **changes) -> list[str]:
        pointers = replace(self.pointers, **changes.pop("pointers", {}))
        shape = replace(self.shape, **changes.pop("shape", {}))
        numbers = NUMBERS | {"workspace": self.workspace, "stream": self.stream} | changes
        self.cuda.launches.clear()
        self.kernels.launch(pointers, shape, **numbers)
        return [launch.kernel for launch in self.cuda.launches]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_decode_appends_attends_and_reduces(bench) -> None:
    assert bench.launch(window=7) == ["append", "decode", "reduce"]
    append, decode, reduce = (launch.arguments for launch in bench.cuda.launches)
    p = bench.pointers
    assert append["key"] == p.key
    assert append["epsilon"] == pytest.approx(1e-6)
    assert (decode["new_tokens"], decode["capacity"], decode["window"], decode["scale"]) == (1, 512, 7, 0.125)
    assert decode["output"] == reduce["partial"] == bench.workspace
    assert bench.workspace < decode["lse"] == reduce["lse"] < bench.workspace + bench.needed
    assert reduce["output"] == p.output
    assert reduce["splits"] == 8  # 512 keys in tiles of 64
    assert [launch.grid for launch in bench.cuda.launches] == [(1, 3, 2), (8, 3, 2), (18, 1, 1)]


@pytest.mark.parametrize(
    ("new", "kernels", "grid"),
    [
        (5, ["append", "decode", "reduce"], (8, 3, 2)),  # 5 tokens of 3 heads are 15 rows of the tile's 16
        (6, ["append", "prefill"], (1, 3, 2)),
        (22, ["append", "prefill"], (2, 3, 2)),  # 66 rows
    ],
)
def test_several_tokens(new, kernels, grid, tmp_path) -> None:
    bench = Bench(tmp_path, new=new)
    assert bench.launch() == kernels
    assert bench.cuda.launches[1].grid == grid
    assert bench.cuda.launches[-1].arguments["output"] == bench.pointers.output


def test_norm_weights_and_scales_are_passed_on(tmp_path) -> None:
    bench = Bench(tmp_path, SPEC.model_copy(update={"qk_norm": True}))
    bench.launch()
    assert bench.cuda.launches[0].arguments["k_norm_weight"] == bench.pointers.k_norm_weight
    assert bench.cuda.launches[1].arguments["q_norm_weight"] == bench.pointers.q_norm_weight
    with pytest.raises(LaunchError, match="q_norm_weight is a null pointer"):
        bench.launch(pointers={"q_norm_weight": 0})


def test_a_quantized_cache_needs_its_scales(tmp_path) -> None:
    bench = Bench(tmp_path, SPEC.model_copy(update={"cache_dtype": "int8"}))
    with pytest.raises(LaunchError, match="key_scale is a null pointer"):
        bench.launch()
    scales = {"key_scale": bench.cuda.cuMemAlloc(12)[1], "value_scale": bench.cuda.cuMemAlloc(12)[1]}
    assert bench.launch(pointers=scales) == ["append", "decode", "reduce"]
    assert bench.cuda.launches[1].arguments["value_scale"] == scales["value_scale"]


def test_nothing_is_launched_with_bad_arguments(bench) -> None:
    for message, changes in {
        "value is a null pointer": {"pointers": {"value": 0}},
        "workspace is a null pointer": {"workspace": 0},
        "output is at .* not aligned to 16 bytes": {"pointers": {"output": bench.pointers.output + 8}},
        "batch is 0": {"shape": {"batch": 0}},
        "new_tokens is 0": {"shape": {"new_tokens": 0}},
    }.items():
        with pytest.raises(LaunchError, match=message):
            bench.launch(**changes)
        assert bench.cuda.launches == []


def test_the_fake_notices_memory_that_is_too_small_or_gone(bench) -> None:
    """What these tests rest on: the fake refuses what a GPU would corrupt."""
    with pytest.raises(Misuse, match=r"present_key: .* bytes .* are not inside an allocation"):
        bench.launch(shape={"capacity": 576})
    bench.cuda.cuMemFree(bench.pointers.query)
    with pytest.raises(Misuse, match="query: use after free"):
        bench.launch()
    with pytest.raises(Misuse, match="freed before"):
        bench.cuda.cuMemFree(bench.pointers.query)


def test_the_fake_notices_an_order_that_races(bench) -> None:
    values = vars(bench.pointers) | {"new_tokens": 1, "capacity": 512, "window": -1, "scale": 1.0, "epsilon": 0.0}
    values |= {"output": bench.workspace, "lse": bench.workspace, "partial": bench.workspace, "splits": 8}
    for kernel, message in (("decode", "without append"), ("reduce", "without decode")):
        with pytest.raises(Misuse, match=message):
            bench.kernels._launch(kernel, bench.shape, values, bench.stream)
    with pytest.raises(Misuse, match="no such stream"):
        bench.launch(stream=12345)


def test_one_byte_less_of_workspace_is_too_little(tmp_path) -> None:
    bench = Bench(tmp_path)
    rows = 2 * 9 * 8
    bench.workspace = bench.cuda.cuMemAlloc(rows * 64 * 4 + rows * 4 - 1)[1]  # without the rounding up
    with pytest.raises(Misuse, match=r"lse: .* bytes"):
        bench.launch()


def test_a_launch_can_be_captured(bench) -> None:
    """The fake refuses to allocate, free or wait meanwhile; the graph launches the same again."""
    cuda = bench.cuda
    cuda.cuStreamBeginCapture(bench.stream, 1)
    bench.launch()
    graph = cuda.cuGraphInstantiate(cuda.cuStreamEndCapture(bench.stream)[1], 0)[1]
    cuda.cuGraphLaunch(graph, bench.stream)
    cuda.cuMemFree(bench.pointers.output)
    with pytest.raises(Misuse, match="use after free"):
        cuda.cuGraphLaunch(graph, bench.stream)


@pytest.mark.parametrize(("shared", "asked"), [(48 << 10, False), ((48 << 10) + 16, True)])
def test_much_shared_memory_is_asked_for(shared, asked, tmp_path) -> None:
    bench = Bench(tmp_path, shared=shared)
    assert bool(bench.cuda.shared_allowed) == asked
    bench.launch()


def test_only_this_gpus_kernels_are_loaded_and_close_unloads_them(bench) -> None:
    assert len(bench.cuda.modules) == 4
    bench.kernels.close()
    bench.kernels.close()
    assert bench.cuda.modules == {}
    with pytest.raises(LaunchError, match="the kernels are closed"):
        bench.launch()


def test_a_gpu_without_kernels_is_named(tmp_path) -> None:
    cuda = FakeCuda(write_kernels(tmp_path, SPEC), capability=75)
    with pytest.raises(NoKernel, match="no kernels for compute capability 75, only for 86, 90"):
        Kernels(tmp_path, driver=cuda)


def test_a_set_that_was_changed_is_refused(tmp_path) -> None:
    manifest = write_kernels(tmp_path, SPEC)
    cuda = FakeCuda(manifest)
    (tmp_path / "reduce.86.cubin").write_bytes(b"\x7fELFother")
    with pytest.raises(KernelFileError, match="does not have the SHA-256"):
        Kernels(tmp_path, driver=cuda)
    assert cuda.modules == {}  # the ones that were loaded before it are unloaded
    first = manifest.kernels[0]
    shorter = first.model_copy(update={"parameters": first.parameters[:-1]})
    changed = manifest.model_copy(update={"kernels": [shorter, *manifest.kernels[1:]]})
    (tmp_path / "kernels.json").write_text(changed.model_dump_json())
    with pytest.raises(KernelFileError, match="takes other parameters than this headfold passes"):
        Kernels(tmp_path, driver=cuda)


def test_a_driver_that_refuses_is_named(bench) -> None:
    class Refusing(FakeCuda):
        def cuLaunchKernel(self, *arguments):
            from fake_cuda import Code

            return (Code.CUDA_ERROR_OUT_OF_MEMORY,)

    bench.kernels._driver = Refusing()
    with pytest.raises(DriverError, match="cuLaunchKernel: CUDA_ERROR_OUT_OF_MEMORY"):
        bench.launch()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="has a GPU")
def test_no_driver_is_one_line() -> None:
    with pytest.raises((NoDriver, NoDevice), match="driver") as caught:
        open_driver()
    assert "\n" not in str(caught.value)


def test_no_device_is_one_line(monkeypatch) -> None:
    bindings = pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(bindings, "driver", FakeCuda(devices=0), raising=False)
    with pytest.raises(NoDevice, match="sees no GPU"):
        open_driver()


def test_every_function_the_fake_has_is_one_of_the_driver() -> None:
    """Names, so that a misspelt call does not pass; the attributes' values too."""
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in vars(FakeCuda):
        if name.startswith("cu"):
            assert callable(getattr(driver, name))
    for enum in ("CUdevice_attribute", "CUfunction_attribute", "CUstreamCaptureMode"):
        for name, value in vars(getattr(FakeCuda, enum)).items():
            assert getattr(getattr(driver, enum), name).value == value
    assert cuda_launch._CTYPES.keys() == {
        p.type for kernel in PARAMETERS for p in parameters(SPEC, kernel) if not p.type.startswith("*")
    }
