"""RoundedMatMul: all ONNX bodies against the numpy reference; rows apart; and sums that no CPU saturates."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from headfold.export.model.rounding import rounded
from headfold.plugins.attention.schema import VERSION
from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.onnx_functions import (
    exact_rounded_matmul,
    onnxruntime_rounded_matmul,
    standard_rounded_matmul,
)
from headfold.plugins.quantized.reference import rounded_matmul, rounded_rows
from headfold.plugins.quantized.schema import DOMAIN, ROUNDED, ROUNDED_INPUTS

K, N = 96, 24
Feeds = dict[str, np.ndarray]


def matrix() -> Feeds:
    rng = np.random.default_rng(0)
    values = rng.integers(-63, 64, (K, N)).astype(np.int8)
    return {"values": values, "scales": (rng.uniform(0.5, 2, N) / 63).astype(np.float32)}


def on_the_grid() -> np.ndarray:
    """Rows [2, 5, K] of very different sizes that rounding leaves as they are, however a CPU rounds."""
    rng = np.random.default_rng(1)
    x = rng.integers(-127, 128, (2, 5, K))
    x[..., 7] = 127
    return (x * 2.0 ** rng.integers(-20, 20, (2, 5, 1))).astype(np.float32)


def model(body: onnx.FunctionProto) -> onnx.ModelProto:
    node = helper.make_node(ROUNDED, ROUNDED_INPUTS, ["out"], domain=DOMAIN)
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, None, K])]
    output = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None, None, None])
    stored = [onnx.numpy_helper.from_array(x, name) for name, x in matrix().items()]
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (DOMAIN, VERSION), ("com.microsoft", 1))]
    graph = helper.make_graph([node], "rounded", inputs, [output], stored)
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=11)


def in_onnxruntime(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("body", [onnxruntime_rounded_matmul, standard_rounded_matmul])
def test_bodies_compute_what_the_reference_does(body) -> None:
    x = on_the_grid()
    right = rounded_matmul(x, **matrix())
    np.testing.assert_allclose(in_onnxruntime(model(body()), x), right, rtol=1e-6)
    if body is standard_rounded_matmul:
        np.testing.assert_allclose(ReferenceEvaluator(model(body())).run(None, {"x": x})[0], right, rtol=1e-6)


@pytest.mark.parametrize("late", [False, True])
def test_the_exact_body_leaves_the_input_as_it_is(late) -> None:
    x = np.random.default_rng(2).standard_normal((2, 5, K), dtype=np.float32)
    values, scales = matrix().values()
    right = x.astype(np.float64) @ (values * scales.astype(np.float64))
    np.testing.assert_allclose(in_onnxruntime(model(exact_rounded_matmul(late)), x), right, atol=1e-5)


def test_the_reference_rounds_each_input_by_half_a_step_at_most() -> None:
    x = np.random.default_rng(2).standard_normal((5, K))
    numbers, steps = rounded_rows(x)
    assert np.abs(numbers).max(1).tolist() == [127] * 5
    assert (np.abs(numbers * steps - x) <= steps * 0.5001).all()


@pytest.mark.parametrize("other", [0.0, 1e30, np.inf, np.nan])
def test_a_row_is_what_it_is_alone_whatever_is_beside_it(other) -> None:
    x = on_the_grid()
    x[0, 1:] = other
    together, alone = (in_onnxruntime(model(onnxruntime_rounded_matmul()), rows) for rows in (x, x[:1, :1]))
    np.testing.assert_array_equal(together[0, 0], alone[0, 0])
    if other == 0:
        assert not together[0, 1:].any()


def saturating(u: np.ndarray, values: np.ndarray) -> int:
    """The sum of products as AVX2 has it without VNNI: of neighbours in 16 bits, which saturate (vpmaddubsw)."""
    pairs = (u.astype(np.int64) * values.astype(np.int64)).reshape(-1, 2).sum(1)
    return int(pairs.clip(-(1 << 15), (1 << 15) - 1).sum())


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_of_the_largest_numbers_do_not_saturate_in_sixteen_bits(sign) -> None:
    values = rounded(torch.full((1, K), 3.0 * sign), 7).values
    largest, wide = values.numpy()[0], np.full(K, 127 * sign)
    u = np.full(K, 255)  # the most that there is
    assert saturating(u, largest) == int((u * largest.astype(int)).sum())
    assert saturating(u, wide) != int((u * wide).sum())  # why the numbers have seven bits
