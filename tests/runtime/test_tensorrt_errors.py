"""What goes wrong with the TensorRT session, over the fakes: each is one line that names the cause and says what to do."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import EngineInvalidityDiagnostics, FakeTensorRT
from tensorrt_rig import FILE, Rig, engine_bytes

from headfold.plugins.tensorrt_library import TensorRTMissing
from headfold.runtime import (
    CapacityError,
    EngineError,
    HeadfoldError,
    InputError,
    ProviderError,
    load,
    tensorrt_session,
)
from headfold.runtime.manifest import read_manifest
from headfold.runtime.tensorrt_session import TensorRTSession


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
        ({}, "has no kernels for compute capability 89, only for 86"),
    ],
)
def test_a_plugin_that_is_missing(plugin, message, with_engine, toy) -> None:
    entry = {"name": "GroupedQueryAttention", "version": "1", "namespace": "headfold", "kernels": "kernels"}
    path = with_engine(attention="plugin", plugin=entry | plugin)
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


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_the_real_tensorrt_calls_garbage_malformed(with_engine) -> None:
    """On a machine without a GPU too: what it says, as our error."""
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
