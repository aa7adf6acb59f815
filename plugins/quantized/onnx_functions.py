"""headfold::QuantizedMatMul and QuantizedGather as ONNX model-local functions: the bodies that a graph can carry for them.

ONNX Runtime inlines `onnxruntime_matmul` and runs its own kernel, packing the matrix once while it loads: as fast, as small and as soon
ready as with the bare node. `standard_matmul` has only standard ops, for everybody else; `gather` serves all. All obey
`headfold.plugins.quantized.schema`.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.schema import (
    DOMAIN,
    GATHER,
    GATHER_INPUTS,
    GATHER_OUTPUT,
    MATMUL,
    MATMUL_INPUTS,
    MATMUL_OUTPUT,
    MatMulAttributes,
)

_MATMUL_ATTRIBUTES = [field.name for field in fields(MatMulAttributes)]


def onnxruntime_matmul() -> FunctionProto:
    """One com.microsoft.MatMulNBits node."""
    node = helper.make_node("MatMulNBits", MATMUL_INPUTS, [MATMUL_OUTPUT], domain="com.microsoft")
    node.attribute.extend(_reference(name) for name in _MATMUL_ATTRIBUTES)
    return _function(MATMUL, MATMUL_INPUTS, MATMUL_OUTPUT, [node], {"": OPSET, "com.microsoft": 1}, _MATMUL_ATTRIBUTES)


def standard_matmul() -> FunctionProto:
    """DequantizeLinear and MatMul; whatever the accuracy level, the input is not rounded."""
    make = helper.make_node
    dequantize = make("DequantizeLinear", ["numbers", "scales", "halves"], ["w"], axis=1)
    dequantize.attribute.append(_reference("block_size"))
    nodes = [
        *_unpacked("values", "parts"),  # [N, K / BLOCK, BLOCK * bits / 8, 8 / bits]
        _constant("matrix", np.array([0, -1])),
        make("Reshape", ["parts", "matrix"], ["numbers"]),  # [N, K]
        make("Shape", ["scales"], ["blocks_shape"]),
        make("Expand", ["half", "blocks_shape"], ["halves"]),  # [N, K / BLOCK]
        dequantize,
        make("Transpose", ["w"], ["w_transposed"], perm=[1, 0]),
        make("MatMul", ["x", "w_transposed"], [MATMUL_OUTPUT]),
    ]
    return _function(MATMUL, MATMUL_INPUTS, MATMUL_OUTPUT, nodes, {"": OPSET}, _MATMUL_ATTRIBUTES)


def gather() -> FunctionProto:
    """Only the rows that are looked up become wide."""
    make = helper.make_node
    nodes = [
        make("Gather", ["values", "indices"], ["packed"]),  # [B, S, K / BLOCK, BLOCK * bits / 8]
        *_unpacked("packed", "numbers"),  # [B, S, K / BLOCK, BLOCK * bits / 8, 8 / bits]
        make("CastLike", ["numbers", "scales"], ["positive"]),
        make("CastLike", ["half", "scales"], ["wide_half"]),
        make("Sub", ["positive", "wide_half"], ["signed"]),
        make("Gather", ["scales", "indices"], ["scales_of_rows"]),  # [B, S, K / BLOCK]
        _constant("behind", np.array([-1, -2])),
        make("Unsqueeze", ["scales_of_rows", "behind"], ["scales_of_blocks"]),
        make("Mul", ["signed", "scales_of_blocks"], ["wide"]),
        _constant("rows_shape", np.array([0, 0, -1])),
        make("Reshape", ["wide", "rows_shape"], [GATHER_OUTPUT]),
    ]
    return _function(GATHER, GATHER_INPUTS, GATHER_OUTPUT, nodes, {"": OPSET}, ["bits"])


def _unpacked(packed: str, numbers: str) -> list[NodeProto]:
    """From bytes the numbers in them, lower bits first, uint8 with an axis more; and `half` of their range, uint8."""
    make = helper.make_node
    bits = make("Constant", [], ["bits_of_it"])
    bits.attribute.append(AttributeProto(name="value_int", ref_attr_name="bits", type=AttributeProto.INT))
    ints = {"zero": 0, "one": 1, "two": 2, "eight": 8}
    return [
        bits,
        *(_constant(name, np.array(value)) for name, value in ints.items()),
        make("Range", ["zero", "eight", "bits_of_it"], ["int_shifts"]),  # [0] or [0, 4]
        make("Cast", ["int_shifts"], ["shifts"], to=TensorProto.UINT8),
        make("Pow", ["two", "bits_of_it"], ["range"]),
        make("Sub", ["range", "one"], ["largest"]),
        make("Cast", ["largest"], ["mask"], to=TensorProto.UINT8),
        make("Div", ["range", "two"], ["int_half"]),
        make("Cast", ["int_half"], ["half"], to=TensorProto.UINT8),
        _constant("last", np.array([-1])),
        make("Unsqueeze", [packed, "last"], ["column"]),
        make("BitShift", ["column", "shifts"], ["shifted"], direction="RIGHT"),
        make("BitwiseAnd", ["shifted", "mask"], [numbers]),
    ]


def _constant(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def _reference(name: str) -> AttributeProto:
    return AttributeProto(name=name, ref_attr_name=name, type=AttributeProto.INT)


def _function(
    name: str, inputs: Sequence[str], output: str, nodes: list[NodeProto], opsets: dict[str, int], attributes: list[str]
) -> FunctionProto:
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_function(DOMAIN, name, list(inputs), [output], nodes, imports, attributes)
