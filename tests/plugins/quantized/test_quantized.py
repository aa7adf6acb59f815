"""Matrices of four and eight bits: all ONNX bodies against the numpy reference, in ONNX Runtime and in onnx's own evaluator."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from headfold.plugins.attention.schema import VERSION
from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.onnx_functions import gather, onnxruntime_matmul, standard_matmul
from headfold.plugins.quantized.reference import dequantized, quantized_gather, quantized_matmul
from headfold.plugins.quantized.schema import (
    BLOCK,
    DOMAIN,
    GATHER,
    GATHER_INPUTS,
    MATMUL,
    MATMUL_INPUTS,
    Bits,
    MatMulAttributes,
)

N, K = 24, 96  # of blocks of 32 an odd number
Feeds = dict[str, np.ndarray]


def matrix(bits: Bits, block: int = BLOCK, zeros: bool = False) -> Feeds:
    """All values that bytes can have, zero points too, scales of either sign."""
    rng, blocks = np.random.default_rng(0), K // block
    values = rng.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8)
    weights = {"values": values, "scales": rng.normal(0, 2.0 ** (1 - bits), (N, blocks)).astype(np.float32)}
    points = {"zeros": rng.integers(0, 256, (N, -(-blocks * bits // 8)), dtype=np.uint8)}
    return weights | (points if zeros else {})


def product(
    bits: Bits, body: onnx.FunctionProto, level: int = 1, weights: Feeds | None = None
) -> tuple[onnx.ModelProto, Feeds]:
    weights = matrix(bits) if weights is None else weights
    attributes = MatMulAttributes(K=K, N=N, bits=bits, block_size=K // weights["scales"].shape[1])
    names = MATMUL_INPUTS[: 1 + len(weights)]
    node = helper.make_node(MATMUL, names, ["out"], domain=DOMAIN, **vars(attributes) | {"accuracy_level": level})
    x = np.random.default_rng(1).standard_normal((2, 5, K), dtype=np.float32)
    return model(node, body, {"x": x}, weights), {"x": x}


def rows(bits: Bits, body: onnx.FunctionProto) -> tuple[onnx.ModelProto, Feeds]:
    node = helper.make_node(GATHER, GATHER_INPUTS, ["out"], domain=DOMAIN, bits=bits)
    indices = np.array([[0, N - 1, 7], [7, 7, 3]])
    return model(node, body, {"indices": indices}, matrix(bits)), {"indices": indices}


def model(node: onnx.NodeProto, body: onnx.FunctionProto, feeds: Feeds, weights: Feeds) -> onnx.ModelProto:
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, kind, feeds[name].shape) for name, kind in kinds.items()]
    output = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None, None, None])
    stored = [onnx.numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph([node], "quantized", inputs, [output], stored)
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (DOMAIN, VERSION), ("com.microsoft", 1))]
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=11)


def in_onnxruntime(proto: onnx.ModelProto, feeds: Feeds) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_body_of_the_product_computes_what_the_reference_does(bits: Bits, block: int, zeros: bool) -> None:
    weights = matrix(bits, block, zeros)
    standard, feeds = product(bits, standard_matmul(zeros), weights=weights)
    right = quantized_matmul(feeds["x"], **weights, bits=bits)
    limit = 1e-5 * np.abs(right).max()  # float32 sums of 96 products, in another order than float64's
    np.testing.assert_allclose(in_onnxruntime(standard, feeds), right, atol=limit)
    np.testing.assert_allclose(ReferenceEvaluator(standard).run(None, feeds)[0], right, atol=limit)
    kernel = product(bits, onnxruntime_matmul(), weights=weights)
    np.testing.assert_allclose(in_onnxruntime(*kernel), right, atol=limit)


@pytest.mark.parametrize("bits", [4, 8])
def test_level_four_rounds_the_input_to_eight_bits(bits: Bits) -> None:
    proto, feeds = product(bits, onnxruntime_matmul(), level=4)
    blocks = feeds["x"].reshape(-1, BLOCK)
    steps = np.abs(blocks).max(1) / 127
    wrong = np.abs(in_onnxruntime(proto, feeds) - quantized_matmul(feeds["x"], **matrix(bits), bits=bits))
    assert (wrong <= np.abs(dequantized(**matrix(bits), bits=bits)).sum(1) * steps.max() / 2 * 1.01).all()


@pytest.mark.parametrize(("bits", "eight"), [(4, False), (8, False), (8, True)])
def test_rows_are_those_of_the_matrix(bits: Bits, eight: bool) -> None:
    proto, feeds = rows(bits, gather(eight))
    right = quantized_gather(**matrix(bits), **feeds, bits=bits)
    np.testing.assert_array_equal(in_onnxruntime(proto, feeds), right)  # one rounding each
    np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, feeds)[0], right)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_itself_on_numbers_that_are_plain_to_see(bits: Bits) -> None:
    values = np.full((1, 1, BLOCK * bits // 8), 0x98 if bits == 4 else 0x7F, np.uint8)
    expected = [0.0, 0.5] * 16 if bits == 4 else [-0.5] * 32  # 8 and 9 of four bits, the lower first; 127 of eight
    np.testing.assert_array_equal(dequantized(values, np.array([[0.5]], np.float32), bits), [expected])


def test_zero_points_are_taken_off_the_numbers_of_their_blocks() -> None:
    values, scales = np.full((1, 2, 16), 0x98, np.uint8), np.array([[0.5, 2.0]], np.float32)
    found = dequantized(values, scales, 4, zeros=np.array([[0x87]], np.uint8))  # 7, then 8
    np.testing.assert_array_equal(found, [[0.5, 1.0] * 16 + [0.0, 2.0] * 16])
