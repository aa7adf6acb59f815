"""Both ONNX bodies and the torch op against the numpy reference: prefill, decode, ragged, chunked, window, softcap, q/k norm."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from headfold.plugins.onnx_functions import NODE_INPUTS, OPSET, onnxruntime_body, schema, standard_body
from headfold.plugins.reference import grouped_query_attention
from headfold.plugins.schema import DOMAIN, INPUTS, LAST_INDEX, OP_TYPE, OPTIONAL_INPUTS, OUTPUTS, VERSION, Attributes
from headfold.plugins.torch_op import grouped_query_attention as torch_op

CAPACITY = 32
HEAD_DIM = 32
TOLERANCE = 2e-5  # float32 sums of at most 32 products of order 1, in another order than float64's

Feeds = dict[str, np.ndarray]


def model(function: onnx.FunctionProto, attributes: Attributes, feeds: Feeds) -> onnx.ModelProto:
    def value(name: str) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(feeds[name].dtype) if name in feeds else TensorProto.FLOAT
        rank = feeds[name].ndim if name in feeds else {"output": 3}.get(name, 4)
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    inputs = [name if name in feeds else "" for name in NODE_INPUTS]
    node = helper.make_node(OP_TYPE, inputs, OUTPUTS, domain=DOMAIN, **vars(attributes))
    graph = helper.make_graph([node], "attention", [value(n) for n in feeds], [value(n) for n in OUTPUTS])
    domains = {"": OPSET, DOMAIN: VERSION} | {opset.domain: opset.version for opset in function.opset_import}
    opsets = [helper.make_opsetid(*item) for item in domains.items()]
    result = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    onnx.checker.check_model(result, full_check=True)
    return result


def run_onnxruntime(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    feeds = feeds | {LAST_INDEX: (feeds["past_lengths"] + feeds["query"].shape[1] - 1).astype(np.int32)}
    proto = model(onnxruntime_body("q_norm_weight" in feeds), attributes, feeds)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def standard(attributes: Attributes, feeds: Feeds) -> onnx.ModelProto:
    return model(standard_body(2 * feeds["cos_cache"].shape[1], "q_norm_weight" in feeds), attributes, feeds)


def run_standard(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    proto = standard(attributes, feeds).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, feeds)


def run_reference_evaluator(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    return ReferenceEvaluator(standard(attributes, feeds)).run(None, feeds)


def run_torch(attributes: Attributes, feeds: Feeds) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(x) for name, x in feeds.items() if name != "total_sequence_length"}
    norms = {name: tensors.pop(name, None) for name in OPTIONAL_INPUTS}
    total = int(feeds["total_sequence_length"])
    return [x.numpy() for x in torch_op(**tensors, **norms, total_sequence_length=total, **vars(attributes))]


BACKENDS = {
    "onnxruntime": run_onnxruntime,
    "standard": run_standard,
    "onnx.reference": run_reference_evaluator,
    "torch": run_torch,
}


def make_feeds(
    rng: np.random.Generator, a: Attributes, past: list[int], new: int, rotated: int, qk_norm: bool
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
    return feeds | ({name: normal(HEAD_DIM) for name in OPTIONAL_INPUTS} if qk_norm else {})


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
    actual = BACKENDS[backend](attributes, feeds)
    reference_feeds = {n: x for n, x in feeds.items() if n != "total_sequence_length"}
    expected = grouped_query_attention(**reference_feeds, attributes=attributes)
    np.testing.assert_allclose(actual[0], expected[0], atol=TOLERANCE)
    for row, length in enumerate(past):  # behind the last token the cache is undefined
        for cache in (1, 2):
            end = length + new
            np.testing.assert_allclose(actual[cache][row, :, :end], expected[cache][row, :, :end], atol=TOLERANCE)


def test_schema_names_what_the_contract_names() -> None:
    declared = schema()
    assert tuple(p.name for p in declared.inputs) == INPUTS + OPTIONAL_INPUTS + (LAST_INDEX,)
    assert tuple(p.name for p in declared.outputs) == OUTPUTS
    assert set(declared.attributes) == set(vars(Attributes(1, 1, 1.0)))


def test_reference_refuses_to_write_behind_the_capacity() -> None:
    attributes = Attributes(2, 1, scale=0.25)
    feeds = make_feeds(np.random.default_rng(0), attributes, [CAPACITY], 1, HEAD_DIM, False)
    del feeds["total_sequence_length"]
    with pytest.raises(ValueError, match="over the capacity of 32"):
        grouped_query_attention(**feeds, attributes=attributes)
