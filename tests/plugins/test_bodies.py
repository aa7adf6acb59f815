"""Both ONNX bodies and the torch op against the numpy reference: prefill, decode, ragged, chunked, window, softcap, q/k norm."""

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from headfold.plugins.attention.onnx_functions import onnxruntime_body, schema, standard_body
from headfold.plugins.attention.reference import grouped_query_attention
from headfold.plugins.attention.schema import (
    ALL_INPUTS,
    DOMAIN,
    LAST_INDEX,
    NORMS,
    OP_TYPE,
    OUTPUTS,
    SCALES,
    SINK,
    TABLES,
    VERSION,
    AttentionInputs,
    Attributes,
)
from headfold.plugins.attention.torch_op import attend
from headfold.plugins.attention.torch_op import grouped_query_attention as torch_op
from headfold.plugins.onnx_body import OPSET

CAPACITY = 32
HEAD_DIM = 32
TOLERANCE = 2e-5  # float32 sums of at most 32 products of order 1, in another order than float64's

Feeds = dict[str, np.ndarray]


def model(function: onnx.FunctionProto, attributes: Attributes, feeds: Feeds) -> onnx.ModelProto:
    def value(name: str) -> onnx.ValueInfoProto:
        like = feeds.get(name.replace("present", "past"))
        kind = helper.np_dtype_to_tensor_dtype(like.dtype) if like is not None else TensorProto.FLOAT
        rank = feeds[name].ndim if name in feeds else {"output": 3}.get(name, 4)
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    last = next(name for name in (SINK, SCALES[-1], LAST_INDEX) if name in feeds or name == LAST_INDEX)
    names = ALL_INPUTS[: ALL_INPUTS.index(last) + 1]
    inputs = [name if name in feeds else "" for name in names]
    node = helper.make_node(OP_TYPE, inputs, OUTPUTS, domain=DOMAIN, **vars(attributes))
    graph = helper.make_graph([node], "attention", [value(n) for n in feeds], [value(n) for n in OUTPUTS])
    domains = {"": OPSET, DOMAIN: VERSION} | {opset.domain: opset.version for opset in function.opset_import}
    opsets = [helper.make_opsetid(*item) for item in domains.items()]
    result = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    onnx.checker.check_model(result, full_check=True)
    return result


def run_onnxruntime(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    feeds = feeds | {LAST_INDEX: (feeds["past_lengths"] + feeds["query"].shape[1] - 1).astype(np.int32)}
    rotary, sinks = "cos_cache" in feeds, SINK in feeds
    norms, packed = "q_norm_weight" in feeds, "key" not in feeds
    body = onnxruntime_body(norms, HEAD_DIM, cache_of(feeds), rotary=rotary, sinks=sinks, packed=packed)
    proto = model(body, attributes, feeds)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def standard(attributes: Attributes, feeds: Feeds) -> onnx.ModelProto:
    rotary_dim = 2 * feeds["cos_cache"].shape[1] if "cos_cache" in feeds else 0
    norms, packed = "q_norm_weight" in feeds, "key" not in feeds
    body = standard_body(rotary_dim, norms, cache_of(feeds), sinks=SINK in feeds, packed=packed)
    return model(body, attributes, wide(feeds))


def wide(feeds: Feeds) -> Feeds:
    """A float8 cache's numbers in float32: nobody computes with float8 here."""
    return {n: x.astype(np.float32) if x.dtype == ml_dtypes.float8_e4m3fn else x for n, x in feeds.items()}


def cache_of(feeds: Feeds) -> str | None:
    return feeds["past_key"].dtype.name if "key_scale" in feeds else None


def run_standard(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    proto = standard(attributes, feeds).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, wide(feeds))


def run_reference_evaluator(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    return ReferenceEvaluator(standard(attributes, feeds)).run(None, wide(feeds))


def run_torch(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    narrow = {"float8_e4m3fn": torch.float8_e4m3fn}.get(cache_of(feeds))
    tensors = {
        name: torch.from_numpy(x.view(np.uint8)).view(narrow)
        if x.dtype == ml_dtypes.float8_e4m3fn
        else torch.from_numpy(x)
        for name, x in feeds.items()
        if name != "total_sequence_length"
    }
    optional = {name: tensors.pop(name, None) for name in (*TABLES, *NORMS, *SCALES, SINK)}
    total = int(feeds["total_sequence_length"])
    results = torch_op(**tensors, **optional, total_sequence_length=total, **vars(attributes))
    return [(x.float() if x.dtype == narrow else x).numpy() for x in results]


BACKENDS = {
    "onnxruntime": run_onnxruntime,
    "standard": run_standard,
    "onnx.reference": run_reference_evaluator,
    "torch": run_torch,
}


def make_feeds(
    rng: np.random.Generator,
    a: Attributes,
    past: list[int],
    new: int,
    rotated: int,
    qk_norm: bool,
    cache: str = "float32",
) -> Feeds:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    angles = np.arange(CAPACITY)[:, None] / 10000 ** (np.arange(0, rotated, 2) / rotated)  # [C, R/2]
    batch = len(past)
    feeds = {
        "query": normal(batch, new, a.num_heads * HEAD_DIM),
        "key": normal(batch, new, a.kv_num_heads * HEAD_DIM),
        "value": normal(batch, new, a.kv_num_heads * HEAD_DIM),
        "past_key": normal(batch, a.kv_num_heads, CAPACITY, HEAD_DIM),
        "past_value": normal(batch, a.kv_num_heads, CAPACITY, HEAD_DIM),
        "past_lengths": np.array(past, np.int64),
        "total_sequence_length": np.array(max(past) + new, np.int32),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    if cache != "float32":
        largest = 127 if cache == "int8" else 448
        feeds |= {
            name: (2 + rng.random(a.kv_num_heads).astype(np.float32)) / largest for name in SCALES
        }  # cuts off some
        for name in ("past_key", "past_value"):
            feeds[name] = (feeds[name] * largest / 4).clip(-largest, largest).astype(np.dtype(cache))
    return feeds | ({name: normal(HEAD_DIM) for name in NORMS} if qk_norm else {})


Comparer = Callable[[np.ndarray, np.ndarray], None]
close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE)


def exact(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))


def compare(backend: str, attributes: Attributes, feeds: Feeds, same_cache: Comparer) -> None:
    """With the reference: the output, and what is defined of the caches, by `same_cache`."""
    actual = BACKENDS[backend](attributes, feeds)
    expected = grouped_query_attention(AttentionInputs(**feeds), attributes)
    close(actual[0], expected[0])
    new = feeds["query"].shape[1]
    for row, length in enumerate(feeds["past_lengths"]):  # behind the last token the cache is undefined
        for cache in (1, 2):
            same_cache(*(x[cache][row, :, : length + new] for x in (actual, expected)))


CASES = {
    "prefill of two": ([0, 0], 9, {}),
    "decode of one": ([7], 1, {}),
    "decode of a ragged batch": ([3, 11, 1], 1, {}),
    "second chunk of a prefill": ([6], 5, {}),
    "fills the capacity": ([CAPACITY - 1], 1, {}),
    "window, prefill": ([0], 12, {"local_window_size": 4}),
    "window, ragged decode": ([9, 2], 1, {"local_window_size": 4}),
    "softcap": ([5], 1, {"softcap": 2.0}),
    "interleaved RoPE": ([4], 3, {"rotary_interleaved": 1}),
    "partial RoPE": ([4], 3, {}),
    "q/k norm": ([0], 5, {"qk_norm_epsilon": 1e-3}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, heads: tuple[int, int], backend: str) -> None:
    past, new, options = CASES[case]
    attributes = Attributes(*heads, scale=HEAD_DIM**-0.5, **options)
    rotated = HEAD_DIM // 2 if case == "partial RoPE" else HEAD_DIM
    feeds = make_feeds(np.random.default_rng(0), attributes, past, new, rotated, case == "q/k norm")
    compare(backend, attributes, feeds, close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("rotary", [False, True], ids=["no RoPE", "RoPE"])
@pytest.mark.parametrize("case", ["prefill of two", "decode of a ragged batch", "window, ragged decode", "q/k norm"])
def test_optional_inputs_of_version_2(case: str, rotary: bool, sinks: bool, backend: str) -> None:
    past, new, options = CASES[case]
    attributes = Attributes(6, 2, scale=HEAD_DIM**-0.5, **options)
    rng = np.random.default_rng(0)
    feeds = make_feeds(rng, attributes, past, new, HEAD_DIM, case == "q/k norm")
    if not rotary:
        feeds = {name: x for name, x in feeds.items() if name not in TABLES}
    if sinks:
        feeds[SINK] = rng.standard_normal(6).astype(np.float32)
    compare(backend, attributes, feeds, close)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("rotary", [False, True], ids=["no RoPE", "RoPE"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize(
    "case", ["prefill of two", "second chunk of a prefill", "window, ragged decode", "partial RoPE"]
)
def test_packed_inputs_are_queries_then_keys_then_values(case, sinks, rotary, cache, heads, backend) -> None:
    past, new, options = CASES[case]
    attributes = Attributes(*heads, scale=HEAD_DIM**-0.5, **options)
    rng = np.random.default_rng(0)
    rotated = HEAD_DIM // 2 if case == "partial RoPE" else HEAD_DIM
    feeds = make_feeds(rng, attributes, past, new, rotated, False, cache)
    if not rotary:
        feeds = {name: x for name, x in feeds.items() if name not in TABLES}
    if sinks:
        feeds[SINK] = rng.standard_normal(heads[0]).astype(np.float32)
    whole = {name: x for name, x in feeds.items() if name not in {"key", "value"}}
    whole["query"] = np.concatenate([feeds[name] for name in ("query", "key", "value")], -1)
    expected = grouped_query_attention(AttentionInputs(**feeds), attributes)
    for actual in (grouped_query_attention(AttentionInputs(**whole), attributes), BACKENDS[backend](attributes, whole)):
        close(actual[0], expected[0])
        for row, length in enumerate(past):  # behind the last token the cache is undefined
            for output in (1, 2):
                close(*(x[output][row, :, : length + new].astype(np.float32) for x in (actual, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", ["prefill of two", "decode of a ragged batch", "window, ragged decode", "q/k norm"])
def test_quantized_caches_equal_the_reference(case: str, cache: str, backend: str) -> None:
    if cache == "float8_e4m3fn" and backend == "onnxruntime":
        pytest.skip("ONNX Runtime has no float8 cache on CPUs")
    past, new, options = CASES[case]
    attributes = Attributes(6, 2, scale=HEAD_DIM**-0.5, **options)
    feeds = make_feeds(np.random.default_rng(0), attributes, past, new, HEAD_DIM, case == "q/k norm", cache)
    compare(backend, attributes, feeds, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"local_window_size": 4}, {"softcap": 2.0}], ids=["plain", "window", "softcap"]
)
def test_what_lies_behind_a_sequence_is_never_seen(options: dict[str, float], backend: str) -> None:
    attributes = Attributes(6, 2, scale=HEAD_DIM**-0.5, **options)
    past = [9, 2]
    feeds = make_feeds(np.random.default_rng(0), attributes, past, 1, HEAD_DIM, False)
    clean = grouped_query_attention(AttentionInputs(**feeds), attributes)
    for row, length in enumerate(past):
        for name in ("past_key", "past_value"):
            feeds[name][row, :, length:] = np.nan
    np.testing.assert_allclose(BACKENDS[backend](attributes, feeds)[0], clean[0], atol=TOLERANCE)


def test_a_soft_cap_is_not_the_end_of_float16() -> None:
    attributes = Attributes(2, 1, scale=HEAD_DIM**-0.5, softcap=50.0)
    feeds = make_feeds(np.random.default_rng(0), attributes, [7], 3, HEAD_DIM, False)
    feeds |= {name: feeds[name] * 90 for name in ("query", "key")}  # products over 65,504, scores that the cap holds
    feeds |= {"cos_cache": np.ones_like(feeds["cos_cache"]), "sin_cache": np.zeros_like(feeds["sin_cache"])}  # exact
    feeds |= {n: x.astype(np.float16).astype(x.dtype) for n, x in feeds.items() if x.dtype == np.float32}
    expected = grouped_query_attention(AttentionInputs(**feeds), attributes)[0]
    tensors = {n: torch.from_numpy(x) for n, x in feeds.items() if n != "total_sequence_length"}
    tensors = {n: x.half() if x.is_floating_point() else x for n, x in tensors.items()}
    actual = attend(AttentionInputs(**tensors, total_sequence_length=10), attributes)
    np.testing.assert_allclose(actual.float().numpy(), expected, atol=0.01)  # of the output, a few eps


def test_schema_names_what_the_contract_names() -> None:
    declared = schema()
    assert tuple(p.name for p in declared.inputs) == ALL_INPUTS
    assert tuple(p.name for p in declared.outputs) == OUTPUTS
    assert set(declared.attributes) == set(vars(Attributes(1, 1, 1.0)))


def test_reference_refuses_to_write_behind_the_capacity() -> None:
    attributes = Attributes(2, 1, scale=0.25)
    feeds = make_feeds(np.random.default_rng(0), attributes, [CAPACITY], 1, HEAD_DIM, False)
    with pytest.raises(ValueError, match="over the capacity of 32"):
        grouped_query_attention(AttentionInputs(**feeds), attributes)
