"""The session against the decoder it was traced from: chunks, ragged rows, the cache in place, and providers."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from headfold.runtime import BundleError, CapacityError, HeadfoldError, InputError, ProviderError, cpu, load
from headfold.runtime.cpu import physical_cores
from headfold.runtime.manifest import read_manifest
from headfold.runtime.session import OrtSession

TOLERANCE = 1e-5  # float32 logits of order 1, sums of a hundred products in another order


@pytest.fixture(scope="module")
def backend(toy) -> OrtSession:
    return OrtSession(toy.path, read_manifest(toy.path), threads=1)


def memory(value: ort.OrtValue) -> np.ndarray:
    return value.numpy()


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 5, 512])
def test_prefill_in_chunks_equals_the_decoder(chunk, all_logits, make_toy, prompts) -> None:
    toy = make_toy(all_logits)
    backend = OrtSession(toy.path, read_manifest(toy.path), threads=1)
    cache = backend.new_cache(2, 16)
    want = toy.logits(prompts[2])
    actual = backend.prefill(cache, 1, prompts[2], chunk=chunk)
    np.testing.assert_allclose(actual, want[-1], atol=TOLERANCE)
    every = backend.prefill(cache, 0, prompts[2], all_logits=True, chunk=chunk)
    np.testing.assert_allclose(every, want, atol=TOLERANCE)
    assert cache.lengths.tolist() == [12, 12]


def test_prefill_writes_its_row_only(backend, prompts) -> None:
    cache = backend.new_cache(3, 16)
    for value in cache.values.values():
        memory(value)[:] = 7
    backend.prefill(cache, 1, prompts[0])
    for value in cache.values.values():
        assert (memory(value)[[0, 2]] == 7).all()
        assert (memory(value)[1, :, len(prompts[0]) :] == 7).all()
        assert (memory(value)[1, :, : len(prompts[0])] != 7).all()


def test_a_second_prefill_goes_on_where_the_first_ended(backend, toy, prompts) -> None:
    cache = backend.new_cache(1, 32)
    backend.prefill(cache, 0, prompts[0])
    actual = backend.prefill(cache, 0, prompts[2])
    np.testing.assert_allclose(actual, toy.logits(np.concatenate([prompts[0], prompts[2]]))[-1], atol=TOLERANCE)


def test_ragged_decode_equals_the_decoder(backend, toy, prompts) -> None:
    cache = backend.new_cache(3, 20)
    for row, ids in enumerate(prompts):
        backend.prefill(cache, row, ids)
    sequences = [list(ids) for ids in prompts]
    patterns = [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 0), (0, 1, 0), (1, 1, 1)]  # rows that are active
    for step, pattern in enumerate(patterns):
        active = np.array(pattern, bool)
        tokens = np.array([step + 10, step + 20, step + 30])
        logits = backend.decode(cache, tokens, active)
        for row in np.flatnonzero(active):
            sequences[row].append(tokens[row])
            np.testing.assert_allclose(logits[row], toy.logits(np.array(sequences[row]))[-1], atol=TOLERANCE)
    assert cache.lengths.tolist() == [len(sequence) for sequence in sequences]


def test_a_full_row_lets_the_others_go_on(backend, toy, prompts) -> None:
    cache = backend.new_cache(3, 12)
    sequences = [prompts[0], prompts[2], prompts[1]]  # the full one in the middle, so that it runs along
    for row, ids in enumerate(sequences):
        backend.prefill(cache, row, ids)
    logits = backend.decode(cache, np.array([1, 2, 3]), np.array([True, False, True]))
    for row, token in ((0, 1), (2, 3)):
        want = toy.logits(np.append(sequences[row], token))[-1]
        np.testing.assert_allclose(logits[row], want, atol=TOLERANCE)
    with pytest.raises(CapacityError, match="13 tokens are 1 over the 12 of this cache"):
        backend.decode(cache, np.array([1, 2, 3]), np.ones(3, bool))


def test_the_cache_is_updated_in_place(backend, prompts) -> None:
    """What the engine returns as present lies where the cache was allocated, before and after."""
    cache = backend.new_cache(2, 40)
    addresses = {name: value.data_ptr() for name, value in cache.values.items()}
    for row in range(2):
        backend.prefill(cache, row, prompts[row])
    for _ in range(20):
        before = {name: memory(value).copy() for name, value in cache.values.items()}
        ends = cache.lengths.copy()
        backend.decode(cache, np.array([3, 4]), np.ones(2, bool))
        *outputs, logits = cache.bound.binding.get_outputs()  # in the order they were bound
        assert logits.data_ptr() == cache.logits.ctypes.data
        assert [output.data_ptr() for output in outputs] == list(addresses.values())
        for name, value in cache.values.items():
            assert value.data_ptr() == addresses[name]
            changed = (memory(value) != before[name]).any((1, 3))  # [B, C]
            assert [np.flatnonzero(row).tolist() for row in changed] == [[end] for end in ends]


def test_bindings_are_made_once_per_window(backend, prompts) -> None:
    cache = backend.new_cache(1, 30)
    backend.prefill(cache, 0, prompts[0])
    first = backend.decode(cache, np.array([3]), np.ones(1, bool))
    bound = cache.bound
    second = backend.decode(cache, np.array([3]), np.ones(1, bool))
    assert cache.bound is bound
    assert np.shares_memory(first, second)  # the preallocated logits


def test_capacity(backend, prompts) -> None:
    with pytest.raises(CapacityError, match="65 tokens is over the bundle's capacity of 64"):
        backend.new_cache(1, 65)
    cache = backend.new_cache(1, 6)
    with pytest.raises(CapacityError, match="7 tokens are 1 over the 6"):
        backend.prefill(cache, 0, prompts[0])
    assert cache.lengths[0] == 0
    assert not any(memory(value).any() for value in cache.values.values())


def test_float16_runs_on_the_cpu(make_toy, prompts) -> None:
    toy = make_toy(dtype="float16")
    backend = OrtSession(toy.path, read_manifest(toy.path), threads=1)
    cache = backend.new_cache(1, 16)
    want = toy.logits(np.append(prompts[0], 5))
    first = backend.prefill(cache, 0, prompts[0])
    second = backend.decode(cache, np.array([5]), np.ones(1, bool))[0]
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose([first, second], want[-2:], atol=2e-2)  # eps 1e-3 through two layers of roundings


def raised(path: Path, **options) -> HeadfoldError:
    with pytest.raises(HeadfoldError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_provider_that_is_not_there_is_an_error(toy, monkeypatch) -> None:
    error = raised(toy.path, provider="tpu")
    assert isinstance(error, ProviderError)
    assert str(error) == "provider 'tpu' is unknown. headfold knows cpu, cuda."
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "this onnxruntime has no CUDAExecutionProvider" in str(raised(toy.path, provider="cuda"))


def test_a_provider_that_does_not_start_is_an_error(toy, monkeypatch) -> None:
    """onnxruntime lists CUDA and makes a session for the CPU instead."""
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **_: real(path, options, providers=["CPUExecutionProvider"])
    )
    error = raised(toy.path, provider="cuda")
    assert isinstance(error, ProviderError)
    assert "CUDAExecutionProvider could not start" in str(error)


def pretend_cuda(monkeypatch, **methods) -> None:
    """A session that runs on the CPU and says that it has a GPU; `methods` are others that it has of its own."""
    real, providers = ort.InferenceSession, ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def pretending(path, options, **_):
        session = real(path, options, providers=["CPUExecutionProvider"])
        for name, method in {"get_providers": lambda: providers, **methods}.items():
            monkeypatch.setattr(session, name, method)
        return session

    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(ort, "InferenceSession", pretending)


def test_what_would_compute_beside_the_gpu_is_an_error(toy, monkeypatch) -> None:
    """Seen on an H200: attention in float32 ran on the CPU, with logits off by 23 at the second step."""
    pretend_cuda(monkeypatch)
    error = raised(toy.path, provider="cuda")
    assert isinstance(error, ProviderError)
    assert "has no CUDA kernel for Gemm, GroupQueryAttention, MatMul" in str(error)
    assert "--dtype float16" in str(error)


def test_experts_in_few_bits_are_refused_on_a_gpu(toy, monkeypatch) -> None:
    node = SimpleNamespace(domain="com.microsoft", op_type="QMoE")
    part = SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=lambda: [node])
    pretend_cuda(monkeypatch, get_provider_graph_assignment_info=lambda: [part])
    error = raised(toy.path, provider="cuda")
    assert isinstance(error, ProviderError)
    assert "experts in four or eight bits have not been tried with CUDA" in str(error)


@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu")
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="has a GPU")
def test_cuda_without_a_gpu_is_one_line(toy, capfd) -> None:
    assert isinstance(raised(toy.path, provider="cuda"), ProviderError)
    assert capfd.readouterr() == ("", "")


def test_bfloat16_on_the_cpu_is_an_error(changed) -> None:
    error = raised(changed({}, dtype="bfloat16"))
    assert isinstance(error, ProviderError)
    assert "Export with --dtype float32" in str(error)


def test_a_run_that_fails_is_one_line_and_nothing_else_is_printed(toy, capfd) -> None:
    backend = OrtSession(toy.path, read_manifest(toy.path), threads=1)
    cache = backend.new_cache(1, 8)
    cache.row_shapes = dict.fromkeys(cache.row_shapes, (3, 8, 16))  # heads that the graph has not
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot run it: .*Expected: 2") as caught:
        backend.prefill(cache, 0, np.array([1]))
    assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


def test_a_cache_that_does_not_fit_the_memory(toy) -> None:
    backend = OrtSession(toy.path, read_manifest(toy.path), threads=1)
    with pytest.raises(CapacityError, match="no memory for a cache of 1000000000000 x 64 tokens"):
        backend.new_cache(10**12, 64)


def test_threads(toy) -> None:
    for threads in (0, "2", 10**9):  # so many would be made
        assert isinstance(raised(toy.path, threads=threads), InputError)
    assert load(toy.path, threads=1).session.get_session_options().intra_op_num_threads == 1
    assert load(toy.path).session.get_session_options().intra_op_num_threads == physical_cores()


@pytest.mark.parametrize(
    ("physical", "allowed", "quota", "cores"),
    [
        (8, 16, "max 100000", 8),
        (8, 4, "max 100000", 4),
        (8, 16, "250000 100000", 2),
        (None, 6, None, 6),
        (8, 16, "50000 100000", 1),
    ],
)
def test_cores_are_those_this_process_may_use(physical, allowed, quota, cores, monkeypatch, tmp_path) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota + "\n")
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", file)
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    assert physical_cores() == cores


def test_errors_of_the_session_are_bundle_errors(tmp_path, toy) -> None:
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OrtSession(tmp_path, read_manifest(toy.path))
