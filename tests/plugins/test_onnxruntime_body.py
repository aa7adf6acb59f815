"""The ONNX Runtime body against the numpy reference: prefill, decode, ragged, chunked, window, softcap."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from headfold.plugins.onnx_functions import OPSET, onnxruntime_body
from headfold.plugins.reference import grouped_query_attention
from headfold.plugins.schema import DOMAIN, INPUTS, OP_TYPE, OUTPUTS, VERSION, Attributes
from onnx import TensorProto, helper

CAPACITY = 32
HEAD_DIM = 16
TOLERANCE = 2e-5  # float32 sums of at most 32 products of order 1, in another order than float64's


def session(attributes: Attributes) -> ort.InferenceSession:
    kinds = {"past_lengths": TensorProto.INT64, "total_sequence_length": TensorProto.INT32}
    ranks = {
        "past_key": 4,
        "past_value": 4,
        "past_lengths": 1,
        "total_sequence_length": 0,
        "cos_cache": 2,
        "sin_cache": 2,
    }
    ranks |= {"present_key": 4, "present_value": 4}

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), [None] * ranks.get(name, 3))

    node_attributes = {n: x for n, x in vars(attributes).items() if n != "qk_norm_epsilon"}
    node = helper.make_node(OP_TYPE, INPUTS, OUTPUTS, domain=DOMAIN, **node_attributes)
    graph = helper.make_graph([node], "attention", [value(n) for n in INPUTS], [value(n) for n in OUTPUTS])
    domains = {"": OPSET, DOMAIN: VERSION, "com.microsoft": 1}
    opsets = [helper.make_opsetid(*item) for item in domains.items()]
    model = helper.make_model(graph, opset_imports=opsets, functions=[onnxruntime_body()], ir_version=11)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def feeds(rng: np.random.Generator, a: Attributes, past: list[int], new: int, rotated: int) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    angles = np.arange(CAPACITY)[:, None] / 10000 ** (np.arange(0, rotated, 2) / rotated)  # [C, R/2]
    batch = len(past)
    return {
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
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, heads: tuple[int, int]) -> None:
    past, new, options = CASES[case]
    attributes = Attributes(*heads, scale=HEAD_DIM**-0.5, **options)
    inputs = feeds(np.random.default_rng(0), attributes, past, new, HEAD_DIM)
    actual = session(attributes).run(None, inputs)
    reference_inputs = {n: x for n, x in inputs.items() if n != "total_sequence_length"}
    expected = grouped_query_attention(**reference_inputs, attributes=attributes)
    np.testing.assert_allclose(actual[0], expected[0], atol=TOLERANCE)
    for row, length in enumerate(past):  # behind the last token the cache is undefined
        for cache in (1, 2):
            end = length + new
            np.testing.assert_allclose(actual[cache][row, :, :end], expected[cache][row, :, :end], atol=TOLERANCE)


def test_reference_refuses_to_write_behind_the_capacity() -> None:
    attributes = Attributes(2, 1, scale=0.25)
    inputs = feeds(np.random.default_rng(0), attributes, [CAPACITY], 1, HEAD_DIM)
    del inputs["total_sequence_length"]
    with pytest.raises(ValueError, match="over the capacity of 32"):
        grouped_query_attention(**inputs, attributes=attributes)
