"""The TensorRT session over a fake driver and a fake TensorRT whose engine is the decoder: what it binds, feeds, captures, frees.

So the numbers are real, and whatever the session would do wrong on a GPU shows: in the logits, or as the fakes' Misuse.
"""

import gc
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, write_kernels
from fake_tensorrt import EngineInvalidityDiagnostics, FakeTensorRT

from headfold.export.bundle import write_manifest
from headfold.plugins import tensorrt_plugin
from headfold.plugins.kernel_contract import KernelSpec, read_kernels
from headfold.plugins.tensorrt_library import TensorRTMissing
from headfold.runtime import (
    CapacityError,
    EngineError,
    HeadfoldError,
    InputError,
    ProviderError,
    device,
    load,
    tensorrt_session,
)
from headfold.runtime.engine_file import _FIELDS, CAPABILITY_BITS
from headfold.runtime.manifest import read_manifest
from headfold.runtime.tensorrt_session import TensorRTSession

TOLERANCE = 1e-5  # float32 logits of order 1, sums of a hundred products in another order
CAPACITY, MAX_BATCH, MAX_INPUT = 64, 4, 6
FILE = "engines/tensorrt-rtx-native.engine"
SPEC = KernelSpec(num_heads=6, kv_num_heads=2, head_dim=16, rotary_dim=16, dtype="float32", cache_dtype="float32")


def engine_bytes(capabilities=(86, 89), version=(1, 7, 1, 116)) -> bytes:
    bits = sum(1 << CAPABILITY_BITS.index(sm) for sm in capabilities)
    body = b"not code"
    return _FIELDS.pack(b"vtrt", 64 + len(body), *version, b"vtrt", bits) + body


def shapes(new: int, batch: int) -> dict[str, dict[str, list[int]]]:
    ranges = {"input_ids": ([1, 1], [batch, new]), "attention_mask": ([1, 1], [batch, CAPACITY])}
    cache = ([1, 2, CAPACITY, 16], [batch, 2, CAPACITY, 16])
    ranges |= {f"past_key_values.{i}.{part}": cache for i in range(2) for part in ("key", "value")}
    return {name: {"min": low, "opt": high, "max": high} for name, (low, high) in ranges.items()}


@pytest.fixture
def with_engine(make_toy, tmp_path):
    """Copies the toy's bundle and adds an engine to it; `changes` are of its entry."""

    def make(all_logits: bool = False, content: bytes | None = None, **changes) -> Path:
        source = make_toy(all_logits).path
        path = tmp_path / "bundle"
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("manifest.json"))
        manifest = json.loads((source / "manifest.json").read_text())
        del manifest["files"]
        (path / "engines").mkdir()
        (path / FILE).write_bytes(engine_bytes() if content is None else content)
        entry = {
            "file": FILE,
            "flavour": "tensorrt-rtx",
            "version": "1.7.1.116",
            "attention": "native",
            "dtype": "float32",
            "compute_capabilities": [86, 89],
            "max_batch": MAX_BATCH,
            "max_input": MAX_INPUT,
            "capacity": CAPACITY,
            "weight_streaming": False,
            "profiles": [
                {"name": "prefill", "shapes": shapes(MAX_INPUT, MAX_BATCH)},
                {"name": "decode", "shapes": shapes(1, MAX_BATCH)},
            ],
            "inputs": manifest["inputs"],
            "outputs": manifest["outputs"],
            "aliases": {},
            "plugin": None,
            "layers": {},
            "tools": {},
        } | changes
        if entry["plugin"]:
            (path / "kernels").mkdir()
            write_kernels(path / "kernels", SPEC, capabilities=(86,))
        write_manifest(path, **manifest | {"format_version": 2, "engines": [entry]})
        return path

    return make


class Rig:
    """A session and the fakes under it."""

    def __init__(self, path: Path, decoder, all_logits: bool = False, **cuda) -> None:
        self.manifest = read_manifest(path)
        self.cuda = FakeCuda(**cuda)
        self.trt = FakeTensorRT(self.cuda, self.manifest.engines[0], decoder, all_logits)
        self.session = TensorRTSession(path, self.manifest, driver=self.cuda, tensorrt=self.trt)
        self.prefills, self.decodes = self.trt.contexts


@pytest.fixture
def rig(with_engine, toy) -> Rig:
    return Rig(with_engine(), toy.decoder)


@pytest.fixture(scope="module")
def prompts(toy) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, toy.config.vocab_size, length) for length in (7, 3, 12)]


def expected(toy, ids) -> np.ndarray:
    """The oracle's logits [S, V], without a cache."""
    return toy.decoder(torch.tensor(np.asarray(ids))[None]).logits[0].numpy()


@pytest.mark.parametrize("every", [False, True], ids=["last logits", "all logits"])
def test_prefill_equals_the_decoder(every, with_engine, toy, prompts) -> None:
    rig = Rig(with_engine(every), toy.decoder, every)
    cache = rig.session.new_cache(2, 20)
    want = expected(toy, prompts[2])
    np.testing.assert_allclose(rig.session.prefill(cache, 1, prompts[2]), want[-1], atol=TOLERANCE)
    assert rig.prefills.runs == [((1, 6), (1, 6)), ((1, 6), (1, 12))]  # as many as max_input at a time
    actual = rig.session.prefill(cache, 0, prompts[2], all_logits=True)
    np.testing.assert_allclose(actual, want, atol=TOLERANCE)
    more = rig.session.prefill(cache, 0, prompts[1])
    np.testing.assert_allclose(more, expected(toy, [*prompts[2], *prompts[1]])[-1], atol=TOLERANCE)
    assert cache.lengths.tolist() == [15, 12]
    assert not rig.decodes.runs


def test_ragged_decode_equals_the_decoder(rig, toy, prompts) -> None:
    cache = rig.session.new_cache(3, 24)
    for row, ids in enumerate(prompts):
        rig.session.prefill(cache, row, ids)
    sequences = [list(ids) for ids in prompts]
    patterns = [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 1), (0, 1, 1), (0, 1, 0), (1, 1, 1)]
    for step, pattern in enumerate(patterns):
        active = np.array(pattern, bool)
        tokens = np.array([step + 10, step + 20, step + 30])
        logits = rig.session.decode(cache, tokens, active)
        for row in np.flatnonzero(active):
            sequences[row].append(int(tokens[row]))
            np.testing.assert_allclose(logits[row], expected(toy, sequences[row])[-1], atol=TOLERANCE)
    assert cache.lengths.tolist() == [len(sequence) for sequence in sequences]


def test_decode_is_captured_once_and_launched(rig, prompts) -> None:
    cache = rig.session.new_cache(1, 40)
    rig.session.prefill(cache, 0, prompts[0])
    for _ in range(10):
        rig.session.decode(cache, np.array([3]), np.ones(1, bool))
    assert rig.decodes.runs == [((1, 1), (1, CAPACITY))] * 10
    assert rig.cuda.log.count("graph") == 9  # the first ran as it is
    assert len(rig.cuda.graphs) == 1  # the captured graph itself is destroyed, its executable is kept
    rig.session.prefill(cache, 0, prompts[0])  # has a context of its own: the graph stays good
    rig.session.decode(cache, np.array([3]), np.ones(1, bool))
    assert rig.cuda.log.count("graph") == 10


def test_a_wider_mask_is_captured_anew(rig, toy, prompts, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_session, "BUCKET", 16)
    cache = rig.session.new_cache(1, 40)
    rig.session.prefill(cache, 0, prompts[2])
    sequence = list(prompts[2])
    for token in range(24):
        logits = rig.session.decode(cache, np.array([token]), np.ones(1, bool))
        sequence.append(token)
        np.testing.assert_allclose(logits[0], expected(toy, sequence)[-1], atol=TOLERANCE)
    widths = [mask[1] for _, mask in rig.decodes.runs]
    assert widths == [16] * 4 + [32] * 16 + [48] * 4
    assert rig.cuda.log.count("graph") == 24 - 3
    assert len(rig.cuda.graphs) == 1


def test_without_capture_decode_runs_as_it_is(rig, toy, prompts) -> None:
    rig.trt.capturable = False
    cache = rig.session.new_cache(1, 40)
    rig.session.prefill(cache, 0, prompts[0])
    for step in range(3):
        logits = rig.session.decode(cache, np.array([step]), np.ones(1, bool))
    np.testing.assert_allclose(logits[0], expected(toy, [*prompts[0], 0, 1, 2])[-1], atol=TOLERANCE)
    assert "graph" not in rig.cuda.log
    rig.trt.capturable = True  # TensorRT-RTX has compiled its kernels
    rig.session.decode(cache, np.array([3]), np.ones(1, bool))
    assert rig.cuda.log.count("graph") == 1


def test_another_cache_does_not_use_the_graph_of_the_first(rig, toy, prompts) -> None:
    caches = [rig.session.new_cache(1, 40) for _ in range(2)]
    for cache, ids in zip(caches, prompts, strict=False):
        rig.session.prefill(cache, 0, ids)
    for step in range(4):
        for cache, ids in zip(caches, prompts, strict=False):
            logits = rig.session.decode(cache, np.array([step]), np.ones(1, bool))
            np.testing.assert_allclose(logits[0], expected(toy, [*ids, *range(step + 1)])[-1], atol=TOLERANCE)


def test_a_full_row_lets_the_others_go_on(rig, toy) -> None:
    cache = rig.session.new_cache(3, CAPACITY)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 300, length) for length in (5, CAPACITY, 8)]
    for row, ids in enumerate(rows):
        rig.session.prefill(cache, row, ids)
    logits = rig.session.decode(cache, np.array([1, 2, 3]), np.array([True, False, True]))
    for row, token in ((0, 1), (2, 3)):
        np.testing.assert_allclose(logits[row], expected(toy, [*rows[row], token])[-1], atol=TOLERANCE)
    with pytest.raises(CapacityError, match="65 tokens are 1 over the 64 of this cache"):
        rig.session.decode(cache, np.array([1, 2, 3]), np.ones(3, bool))


def test_memory_is_allocated_once_and_freed_with_the_cache(rig, prompts) -> None:
    before = dict(rig.cuda.allocations)
    cache = rig.session.new_cache(2, 30)
    allocated = dict(rig.cuda.allocations)
    assert (
        max(allocated.values()) == 4 * 2 * 2 * CAPACITY * 16 * 4
    )  # layers' keys and values, rows, heads, C, D, float32
    for row in range(2):
        rig.session.prefill(cache, row, prompts[row])
    for _ in range(5):
        rig.session.decode(cache, np.array([3, 4]), np.ones(2, bool))
    assert rig.cuda.allocations == allocated
    del cache
    gc.collect()
    assert rig.cuda.allocations == before


def test_generate_runs_on_it(with_engine, toy, monkeypatch) -> None:
    path = with_engine()
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda, read_manifest(path).engines[0], toy.decoder)
    monkeypatch.setattr(device, "open_driver", lambda: cuda)
    monkeypatch.setattr(tensorrt_session, "open_tensorrt", {"tensorrt-rtx": trt}.get)
    model = load(path, backend="tensorrt")
    prompts = [[5, 6, 7], [8] * 11]
    answers = model.generate(prompts, max_new_tokens=12, ignore_eos=True)
    assert [answer.token_ids for answer in answers] == [toy.greedy(ids, 12) for ids in prompts]
    assert cuda.log.count("graph") == 10  # 11 decode steps


def test_the_plugins_kernels_are_loaded_and_registered(with_engine, toy, monkeypatch) -> None:
    plugin = {"name": "GroupedQueryAttention", "version": "1", "namespace": "headfold", "kernels": "kernels"}
    path = with_engine(attention="plugin", plugin=plugin | {"kernels_sha256": "0" * 64})
    registered = {}
    monkeypatch.setattr(tensorrt_plugin, "register", lambda trt, kernels: registered.update({trt: kernels}))
    rig = Rig(path, toy.decoder, manifest=read_kernels(path / "kernels"))
    assert registered[rig.trt].spec == SPEC
    assert len(rig.cuda.modules) == 4


# What goes wrong


def refused(path: Path, toy, cuda: FakeCuda | None = None, attention: str | None = None, **changes) -> HeadfoldError:
    manifest = read_manifest(path)
    cuda = FakeCuda() if cuda is None else cuda
    trt = FakeTensorRT(cuda, manifest.engines[0], toy.decoder)
    for name, value in changes.items():
        setattr(trt, name, value)
    with pytest.raises(HeadfoldError) as caught:
        TensorRTSession(path, manifest, attention, driver=cuda, tensorrt=trt)
    assert "\n" not in str(caught.value)
    return caught.value


def test_another_gpu(with_engine, toy) -> None:
    error = refused(with_engine(), toy, FakeCuda(capability=90))
    assert isinstance(error, EngineError)
    assert "this GPU has compute capability 90, the bundle's engines are for 86, 89" in str(error)
    assert "--sm 90" in str(error)


def test_another_version_of_tensorrt(with_engine, toy) -> None:
    error = refused(with_engine(), toy, __version__="1.8.0.1")
    assert isinstance(error, EngineError)
    assert "was built by tensorrt-rtx 1.7.1.116, this is 1.8.0.1. Install tensorrt-rtx==1.7.1.116" in str(error)


@pytest.mark.parametrize("content", [engine_bytes()[:-3], engine_bytes()[:40], b"garbage" * 20, engine_bytes((75,))])
def test_a_damaged_engine(content, with_engine, toy) -> None:
    assert "headfold build" in str(refused(with_engine(content=content), toy))


def test_an_engine_that_tensorrt_refuses(with_engine, toy) -> None:
    flags = EngineInvalidityDiagnostics.UNSUPPORTED_CC | EngineInvalidityDiagnostics.MALFORMED_ENGINE
    path = with_engine()
    error = refused(path, toy, diagnostics=int(flags))
    assert "TensorRT-RTX calls it invalid: unsupported cc, malformed engine" in str(error)
    assert "TensorRT cannot load it: Serialization assertion failed" in str(refused(path, toy, loads=False))


def test_an_engine_with_other_tensors(with_engine, toy) -> None:
    error = refused(with_engine(), toy, names=["input_ids", "logits"])
    assert "its inputs and outputs are not those of the manifest: attention_mask" in str(error)


def test_no_such_engine(with_engine, toy) -> None:
    error = refused(with_engine(), toy, attention="plugin")
    assert "has no TensorRT engine with plugin attention" in str(error)


def test_a_bundle_without_engines(toy) -> None:
    with pytest.raises(HeadfoldError, match=r"has no TensorRT engine. headfold build .* --target tensorrt-rtx"):
        load(toy.path, backend="tensorrt")


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            {"version": "2"},
            "needs the plugin headfold::GroupedQueryAttention version 2, this headfold has .* version 1",
        ),
        ({"kernels": "elsewhere"}, r"elsewhere/kernels.json: is missing"),
        ({}, "has no kernels for compute capability 89, only for 86"),
    ],
)
def test_a_plugin_that_is_missing(plugin, message, with_engine, toy) -> None:
    entry = {"name": "GroupedQueryAttention", "version": "1", "namespace": "headfold", "kernels": "kernels"}
    path = with_engine(attention="plugin", plugin=entry | {"kernels_sha256": "0" * 64} | plugin)
    error = refused(path, toy, FakeCuda(capability=89))
    assert isinstance(error, EngineError)
    assert re.search(message, str(error))


def test_tensorrt_that_is_not_installed(with_engine, monkeypatch) -> None:
    def missing(flavour: str):
        raise TensorRTMissing(f"{flavour} is not installed: pip install tensorrt-rtx")

    path = with_engine()
    monkeypatch.setattr(tensorrt_session, "open_tensorrt", missing)
    with pytest.raises(ProviderError, match="tensorrt-rtx is not installed: pip install tensorrt-rtx"):
        TensorRTSession(path, read_manifest(path), driver=FakeCuda())


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="has a GPU")
def test_no_gpu(with_engine) -> None:
    with pytest.raises(ProviderError, match=r"backend 'tensorrt': .*driver.* Use backend 'onnxruntime'") as caught:
        load(with_engine(), backend="tensorrt")
    assert "\n" not in str(caught.value)


def test_an_unknown_backend(toy) -> None:
    with pytest.raises(InputError, match="backend 'openvino' is unknown"):
        load(toy.path, backend="openvino")


def test_what_is_over_the_engines_sizes(rig, prompts) -> None:
    with pytest.raises(CapacityError, match=r"65 tokens is over the engine's 64.*--capacity"):
        rig.session.new_cache(1, 65)
    with pytest.raises(CapacityError, match=r"5 rows is over the engine's 4.*--max-batch"):
        rig.session.new_cache(5, 8)
    cache = rig.session.new_cache(1, 6)
    with pytest.raises(CapacityError, match="7 tokens are 1 over the 6"):
        rig.session.prefill(cache, 0, prompts[0])
    assert not rig.prefills.runs


def test_a_gpu_that_is_too_small(with_engine, toy) -> None:
    rig = Rig(with_engine(), toy.decoder, memory_bytes=100_000)
    with pytest.raises(CapacityError, match=r"the GPU has no 0.00 GB left"):
        rig.session.new_cache(4, 60)


def test_a_run_that_fails_is_named_and_leaves_the_stream_usable(rig, prompts, monkeypatch) -> None:
    cache = rig.session.new_cache(1, 40)
    rig.session.prefill(cache, 0, prompts[0])
    rig.session.decode(cache, np.array([3]), np.ones(1, bool))

    def fail(stream: int) -> bool:
        rig.trt.logger.log(1, "Cask error\nin a kernel")
        return False

    monkeypatch.setattr(rig.decodes, "execute_async_v3", fail)
    with pytest.raises(EngineError, match="TensorRT refuses to run: Cask error in a kernel"):
        rig.session.decode(cache, np.array([3]), np.ones(1, bool))
    assert not rig.cuda.capturing
    assert cache.lengths.tolist() == [8]
    monkeypatch.undo()
    rig.session.decode(cache, np.array([3]), np.ones(1, bool))
    assert cache.lengths.tolist() == [9]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_a_real_engine_on_a_real_gpu(attention, make_toy, tmp_path, prompts) -> None:
    from headfold.export.engine_options import BuildOptions
    from headfold.export.progress import Reporter
    from headfold.export.tensorrt_build import build_engine

    try:
        capability = device.Device().capability
    except ProviderError as error:
        pytest.skip(f"no GPU: {error.what}")
    if capability not in CAPABILITY_BITS:
        pytest.skip(f"TensorRT-RTX builds nothing for compute capability {capability}")
    toy = make_toy(dtype="float16")
    path = tmp_path / "bundle"
    shutil.copytree(toy.path, path)
    options = BuildOptions(attention=attention, compute_capabilities=(capability,), max_batch=3, max_input=8)
    build_engine(path, options, Reporter(quiet=True))
    backend = load(path, backend="tensorrt").backend
    cache = backend.new_cache(3, 40)
    sequences = [list(ids) for ids in prompts]
    for row, ids in enumerate(prompts):
        actual = backend.prefill(cache, row, ids)
        np.testing.assert_allclose(
            actual, expected(toy, ids)[-1], atol=2e-2
        )  # eps 1e-3 through two layers of roundings
    for step in range(6):
        logits = backend.decode(cache, np.full(3, step), np.ones(3, bool))
        for row, sequence in enumerate(sequences):
            sequence.append(step)
            np.testing.assert_allclose(logits[row], expected(toy, sequence)[-1], atol=2e-2)


def test_the_real_tensorrt_calls_garbage_malformed(with_engine) -> None:
    """On a machine without a GPU too: what it says, as our error."""
    pytest.importorskip("tensorrt_rtx_bindings")
    from headfold.plugins.tensorrt_library import open_tensorrt

    path = with_engine()
    content = bytearray((path / FILE).read_bytes())
    content[1:4] = b"xxx"
    manifest = read_manifest(path)
    session = object.__new__(TensorRTSession)
    session.entry, session._log = manifest.engines[0], tensorrt_session._logger(open_tensorrt("tensorrt-rtx"))
    session._runtime = open_tensorrt("tensorrt-rtx").Runtime(session._log)
    (path / FILE).write_bytes(content)
    with pytest.raises(EngineError, match="TensorRT-RTX calls it invalid: malformed engine"):
        session._deserialize(open_tensorrt("tensorrt-rtx"), path / FILE)
