"""Kernels compiled for GPUs that are not here: all targets, byte for byte the same, cached by content, signature checked."""

import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import pytest

from headfold.export.engine import kernels
from headfold.export.engine.kernels import check_signature, compile_spec, kernel_spec
from headfold.export.engine.lowering import lower
from headfold.export.graph.passes import attention_nodes
from headfold.plugins.attention.kernel_contract import (
    PARAMETERS,
    KernelFileError,
    KernelManifest,
    KernelSpec,
    Parameter,
    grid,
    max_workspace_bytes,
    partial_bytes,
    read_cubin,
    read_kernels,
    splits,
    tiles,
    workspace_bytes,
)
from headfold.plugins.dtypes import DTYPES, FLOATS, QUANTIZED
from headfold.plugins.gpus import GPUS
from headfold.runtime.errors import KernelError
from headfold.runtime.manifest import MODEL

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SMALL = KernelSpec(num_heads=6, kv_num_heads=2, head_dim=16, rotary_dim=16, dtype="float16", cache_dtype="float16")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, KernelManifest]:
    """All targets of a small model."""
    directory = tmp_path_factory.mktemp("kernels")
    return directory, compile_spec(SMALL, tuple(GPUS), directory, cache=directory / "cache")


def test_every_target_has_every_kernel(built) -> None:
    directory, manifest = built
    assert read_kernels(directory) == manifest
    assert manifest.capabilities == [75, 80, 86, 87, 89, 90, 100, 120, 121]
    assert {(entry.kernel, entry.capability) for entry in manifest.kernels} == {
        (kernel, capability) for kernel in PARAMETERS for capability in GPUS
    }
    for entry in manifest.kernels:
        cubin = read_cubin(directory, entry)
        assert cubin[:4] == b"\x7fELF"
        assert cubin[18:20] == b"\xbe\x00"  # e_machine: EM_CUDA
        assert entry.shared_bytes <= GPUS[entry.capability].shared_kib << 10
        assert str(kernels._SOURCE.parent).encode() not in cubin


def test_code_is_for_the_architecture_it_names(built) -> None:
    """nvdisasm and cuobjdump come with Triton and are no part of how it compiles."""
    import triton

    directory, manifest = built
    for entry in manifest.kernels:
        if entry.kernel == "append":
            command = [triton.knobs.nvidia.cuobjdump.path, "-elf", str(directory / entry.file)]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert re.search(rf"sm={entry.capability}a?,", shown)


def test_the_same_source_gives_the_same_bytes(built, tmp_path) -> None:
    directory, manifest = built
    compile_spec(SMALL, (86, 120), tmp_path, cache=tmp_path / "another cache")
    for entry in read_kernels(tmp_path).kernels:
        assert entry in manifest.kernels
        assert (tmp_path / entry.file).read_bytes() == (directory / entry.file).read_bytes()


@pytest.mark.parametrize(("cache_dtype", "capability"), [("int8", 86), ("float8_e4m3fn", 89)])
def test_quantized_caches_compile(cache_dtype, capability, tmp_path) -> None:
    spec = SMALL.model_copy(update={"cache_dtype": cache_dtype})
    manifest = compile_spec(spec, (capability,), tmp_path, cache=tmp_path / "cache")
    stored = {p.type for entry in manifest.kernels for p in entry.parameters if p.name.startswith("present")}
    assert stored == {{"int8": "*i8", "float8_e4m3fn": "*fp8e4nv"}[cache_dtype]}


def no_process(*args, **kwargs):
    raise AssertionError("something was compiled")


def test_what_was_compiled_is_not_compiled_again(built, tmp_path, monkeypatch) -> None:
    directory, manifest = built
    monkeypatch.setattr(subprocess, "Popen", no_process)
    again = compile_spec(SMALL, (90, 75), tmp_path, cache=directory / "cache")
    assert again.kernels == [entry for entry in manifest.kernels if entry.capability in (75, 90)]
    with pytest.raises(AssertionError, match="something was compiled"):  # the code depends on the group
        compile_spec(SMALL.model_copy(update={"num_heads": 4}), (75,), tmp_path, cache=directory / "cache")


def test_another_source_is_compiled_again(built, tmp_path, monkeypatch) -> None:
    other = tmp_path / "triton_kernels.py"
    other.write_bytes(kernels._SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(kernels, "_SOURCE", other)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(AssertionError, match="something was compiled"):
        compile_spec(SMALL, (75,), tmp_path / "k", cache=built[0] / "cache")


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".cubin", lambda content: content[:-1]),
        (".json", lambda content: content[:-1]),
        (".json", lambda content: b""),
        (".json", lambda content: b"\xff\xfe"),
        (".json", lambda content: content.replace(b'"num_warps": ', b'"num_warps": -')),
        (".json", lambda content: content.replace(b'"entry"', b'"name"')),
    ],
)
def test_a_damaged_cache_is_not_used(suffix, damage, built, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in (built[0] / "cache").iterdir():
        content = file.read_bytes()
        (cache / file.name).write_bytes(damage(content) if file.suffix == suffix else content)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(AssertionError, match="something was compiled"):
        compile_spec(SMALL, (75,), tmp_path / "k", cache=cache)


PTX = """.visible .entry reduce(
	.param .u64 .ptr .global .align 1 reduce_param_0,
	.param .u32 reduce_param_1,
	.param .f32 reduce_param_2,
	.param .u64 .ptr .global .align 1 reduce_param_3,
	.param .u64 .ptr .global .align 1 reduce_param_4
)
"""
FITTING = [
    Parameter(name="output", type="*fp16"),
    Parameter(name="splits", type="i32"),
    Parameter(name="scale", type="fp32"),
]


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (FITTING[:2], "parameter 2 of the compiled code takes 4 bytes, the launcher passes 8 bytes for global_scratch"),
        ([*FITTING, FITTING[1]], "takes 8 bytes, the launcher passes 4 bytes for splits"),
        ([FITTING[1], FITTING[0], FITTING[2]], "parameter 0 .* takes 8 bytes, the launcher passes 4 bytes for splits"),
        ([*FITTING, FITTING[0]], "parameter 5 of the compiled code takes nothing, the launcher passes 8 bytes"),
    ],
)
def test_another_signature_is_an_error(expected, message) -> None:
    check_signature(PTX, "reduce", FITTING)
    with pytest.raises(KernelError, match=message):
        check_signature(PTX, "reduce", expected)
    with pytest.raises(KernelError, match="no entry 'append'"):
        check_signature(PTX, "append", FITTING)


def test_a_planted_parameter_is_caught_in_the_compiler(tmp_path, monkeypatch) -> None:
    """Through the real process and the real PTX: the contract says i32 where the kernel was compiled with a pointer."""
    real = subprocess.Popen
    plant = (
        "from headfold.export.engine import kernel_worker; from headfold.plugins.attention import kernel_contract as c; "
        + (
            "honest = c.parameters; import headfold.plugins.attention.triton_kernels; "
            "c.parameters = lambda s, k: honest(s, k)[:-1]; kernel_worker.main()"
        )
    )
    monkeypatch.setattr(subprocess, "Popen", lambda command, **o: real([command[0], "-c", plant], **o))
    with pytest.raises(KernelError, match=r"Triton cannot compile it: KernelError: .*the launcher passes"):
        compile_spec(SMALL, (86,), tmp_path, cache=tmp_path / "cache")


def test_a_compiler_that_crashes_is_one_line(tmp_path, monkeypatch) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **o: real([command[0], "-c", "import os; os.abort()"], **o)
    )
    with pytest.raises(KernelError, match="Triton's compiler crashed"):
        compile_spec(SMALL, (86,), tmp_path, cache=tmp_path / "cache")


def test_what_there_are_no_kernels_for(tmp_path) -> None:
    def refused(message: str, capabilities: tuple[int, ...], **changes) -> None:
        with pytest.raises(KernelError, match=message) as caught:
            compile_spec(SMALL.model_copy(update=changes), capabilities, tmp_path)
        assert "\n" not in str(caught.value)

    refused("no kernels for compute capability 61.*There are for 75, 80", (86, 61))
    refused("no compute capability is given", ())
    refused("capability 86 has no float8_e4m3fn. Use an int8 cache", (86,), cache_dtype="float8_e4m3fn")
    assert list(tmp_path.iterdir()) == []


def test_the_spec_is_what_the_lowered_graph_calls(tensorrt_toy) -> None:
    lowered = lower(tensorrt_toy("float16").bundle / MODEL, "plugin", 24)
    spec = kernel_spec(lowered)
    assert (spec.num_heads, spec.kv_num_heads, spec.head_dim, spec.rotary_dim) == (6, 2, 16, 16)
    assert (spec.dtype, spec.cache_dtype, spec.softcap, spec.rotary_interleaved) == ("float16", "float16", 0, False)
    second = attention_nodes(lowered)[1]
    second.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
    with pytest.raises(KernelError, match=r"softcap 30.0 instead of 0.0.*--attention native") as caught:
        kernel_spec(lowered)
    assert caught.value.where == second.name
    for node in attention_nodes(lowered):
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", 5)
    with pytest.raises(KernelError, match=r"num_heads 5 is not divisible by kv_num_heads 2.*--attention native"):
        kernel_spec(lowered)


def test_altered_files_are_refused(built, tmp_path) -> None:
    directory, manifest = built
    with pytest.raises(KernelFileError, match=r"kernels.json: is missing"):
        read_kernels(tmp_path)
    (tmp_path / "kernels.json").write_text(manifest.model_dump_json().replace('"float16"', '"float61"', 1))
    with pytest.raises(KernelFileError, match=r"kernels.json: spec.dtype: Input should be"):
        read_kernels(tmp_path)
    entry = manifest.kernels[0]
    (tmp_path / entry.file).write_bytes((directory / entry.file).read_bytes()[:-1] + b"!")
    with pytest.raises(KernelFileError, match="does not have the SHA-256"):
        read_cubin(tmp_path, entry)
    escaping = entry.model_copy(update={"file": f"../{tmp_path.name}/{entry.file}"})
    with pytest.raises(KernelFileError, match="no regular file"):
        read_cubin(tmp_path, escaping)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4096, 131072])
@pytest.mark.parametrize("heads", [(9, 3), (32, 1), (32, 32), (32, 8)])
def test_workspace_holds_what_decode_writes(heads, capacity) -> None:
    s = KernelSpec(
        num_heads=heads[0], kv_num_heads=heads[1], head_dim=64, rotary_dim=64, dtype="float16", cache_dtype="float16"
    )
    most = max_workspace_bytes(s, 9, 128, capacity)
    for batch in range(1, 10):
        for new in (1, 2, 16, 128):
            size, count = workspace_bytes(s, batch, new, capacity), splits(s, batch, capacity)
            assert size <= most
            assert 1 <= count <= tiles(s, "reduce").rows
            if new * s.group > tiles(s, "decode").rows:
                assert size == 0
                continue
            rows = batch * new * s.num_heads
            assert partial_bytes(s, batch, new, capacity) >= rows * count * s.head_dim * 4
            assert size >= partial_bytes(s, batch, new, capacity) + rows * count * 4
            assert grid(s, ("splits", "kv_heads", "batch"), 16, batch, new, capacity) == (count, heads[1], batch)


def test_item_sizes_are_those_of_the_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    for name, size in ((name, names.size) for name, names in DTYPES.items() if name in (*FLOATS, *QUANTIZED)):
        assert np.dtype(getattr(ml_dtypes, name, None) or name).itemsize == size


def test_cache_directory_is_the_users(tmp_path, monkeypatch, built) -> None:
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path))
    target = tmp_path / "headfold" / "kernels"
    target.mkdir(parents=True)
    for file in (built[0] / "cache").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(subprocess, "Popen", no_process)
    compile_spec(SMALL, (86,), tmp_path / "k")
    assert json.loads((tmp_path / "k" / "kernels.json").read_text())["spec"]["num_heads"] == 6
