"""The TensorRT session over a fake driver and a fake TensorRT whose engine is the decoder: what it binds, feeds, captures, frees.

So the numbers are real, and whatever the session would do wrong on a GPU shows: in the logits, or as the fakes' Misuse.
"""

import gc
import shutil

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from tensorrt_rig import CAPACITY, SPEC, TOLERANCE, Rig

from headfold.plugins.attention import tensorrt_plugin
from headfold.plugins.attention.kernel_contract import read_kernels
from headfold.plugins.gpus import RTX_CAPABILITIES
from headfold.runtime import (
    CapacityError,
    ProviderError,
    device,
    load,
    tensorrt_session,
)
from headfold.runtime.manifest import read_manifest


@pytest.mark.parametrize("every", [False, True], ids=["last logits", "all logits"])
def test_prefill_equals_the_decoder(every, with_engine, toy, prompts) -> None:
    rig = Rig(with_engine(every), toy.decoder, every)
    cache = rig.session.new_cache(2, 20)
    want = toy.logits(prompts[2])
    np.testing.assert_allclose(rig.session.prefill(cache, 1, prompts[2]), want[-1], atol=TOLERANCE)
    assert rig.prefills.runs == [((1, 6), (1, 6)), ((1, 6), (1, 12))]  # as many as max_input at a time
    actual = rig.session.prefill(cache, 0, prompts[2], all_logits=True)
    np.testing.assert_allclose(actual, want, atol=TOLERANCE)
    more = rig.session.prefill(cache, 0, prompts[1])
    np.testing.assert_allclose(more, toy.logits([*prompts[2], *prompts[1]])[-1], atol=TOLERANCE)
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
            np.testing.assert_allclose(logits[row], toy.logits(sequences[row])[-1], atol=TOLERANCE)
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
        np.testing.assert_allclose(logits[0], toy.logits(sequence)[-1], atol=TOLERANCE)
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
    np.testing.assert_allclose(logits[0], toy.logits([*prompts[0], 0, 1, 2])[-1], atol=TOLERANCE)
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
            np.testing.assert_allclose(logits[0], toy.logits([*ids, *range(step + 1)])[-1], atol=TOLERANCE)


def test_a_full_row_lets_the_others_go_on(rig, toy) -> None:
    cache = rig.session.new_cache(3, CAPACITY)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 300, length) for length in (5, CAPACITY, 8)]
    for row, ids in enumerate(rows):
        rig.session.prefill(cache, row, ids)
    logits = rig.session.decode(cache, np.array([1, 2, 3]), np.array([True, False, True]))
    for row, token in ((0, 1), (2, 3)):
        np.testing.assert_allclose(logits[row], toy.logits([*rows[row], token])[-1], atol=TOLERANCE)
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
    path = with_engine(attention="plugin", plugin=plugin)
    registered = {}
    monkeypatch.setattr(tensorrt_plugin, "register", lambda trt, kernels: registered.update({trt: kernels}))
    rig = Rig(path, toy.decoder, manifest=read_kernels(path / "kernels"))
    assert registered[rig.trt].spec == SPEC
    assert len(rig.cuda.modules) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_a_real_engine_on_a_real_gpu(attention, make_toy, tmp_path, prompts) -> None:
    from headfold.export.engine.build import build_engine
    from headfold.export.engine.options import BuildOptions
    from headfold.export.progress import Reporter

    try:
        capability = device.Device().capability
    except ProviderError as error:
        pytest.skip(f"no GPU: {error.what}")
    if capability not in RTX_CAPABILITIES:
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
        np.testing.assert_allclose(actual, toy.logits(ids)[-1], atol=2e-2)  # eps 1e-3 through two layers of roundings
    for step in range(6):
        logits = backend.decode(cache, np.full(3, step), np.ones(3, bool))
        for row, sequence in enumerate(sequences):
            sequence.append(step)
            np.testing.assert_allclose(logits[row], toy.logits(sequence)[-1], atol=2e-2)
