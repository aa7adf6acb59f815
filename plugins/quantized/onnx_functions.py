"""headfold's operators for matrices of few bits as ONNX model-local functions: the bodies that a graph can carry for them.

ONNX Runtime inlines `onnxruntime_matmul` and runs its own kernel, packing the matrix once while it loads: as fast, as small and as soon
ready as with the bare node. `standard_matmul` has only standard ops, for everybody else; `gather` serves all.
RoundedMatMul is standard ops but for the product, whose integers ONNX Runtime makes floats at once; `exact_rounded_matmul` leaves the
input as it is. All obey `headfold.plugins.quantized.schema`.
"""

import numpy as np
from onnx import FunctionProto, TensorProto, numpy_helper

from headfold.plugins.onnx_body import OPSET, Body, Operator
from headfold.plugins.quantized.schema import (
    DOMAIN,
    FLOAT8,
    GATHER,
    GATHER_INPUTS,
    GATHER_OUTPUT,
    MATMUL,
    MATMUL_INPUTS,
    MATMUL_OUTPUT,
    ROUNDED,
    ROUNDED_INPUTS,
    SMALLEST,
    VERSION,
    GatherAttributes,
    GatherInputs,
    MatMulAttributes,
    MatMulInputs,
    RoundedAttributes,
    RoundedInputs,
)

_MATMUL = Operator(DOMAIN, MATMUL, VERSION, MatMulInputs, MatMulAttributes, (MATMUL_OUTPUT,))
_GATHER = Operator(DOMAIN, GATHER, VERSION, GatherInputs, GatherAttributes, (GATHER_OUTPUT,))
_ROUNDED = Operator(DOMAIN, ROUNDED, VERSION, RoundedInputs, RoundedAttributes, (MATMUL_OUTPUT,))
_FLOAT8 = Operator(DOMAIN, FLOAT8, VERSION, RoundedInputs, RoundedAttributes, (MATMUL_OUTPUT,))


def onnxruntime_matmul() -> FunctionProto:
    """One com.microsoft.MatMulNBits node; of a call without zero points it has none either."""
    body = Body(_MATMUL)
    same = {name: name for name in _MATMUL.kinds}
    body("MatMulNBits", MATMUL_INPUTS, MATMUL_OUTPUT, refs=same, domain="com.microsoft")
    return body.function({"": OPSET, "com.microsoft": 1}, MATMUL_INPUTS)


def standard_matmul(zeros: bool = False) -> FunctionProto:
    """DequantizeLinear and MatMul; whatever the accuracy level, the input is not rounded. With `zeros` every call has zero points."""
    body = Body(_MATMUL)
    shifts(body)
    body.ints("matrix", 0, -1)
    unpack(body, "values", "parts")  # [N, G, block * bits / 8, 8 / bits]
    body("Reshape", ["parts", "matrix"], "numbers")  # [N, K]
    if zeros:
        unpack(body, "zeros", "zeros_parts")  # [N, G * bits / 8, 8 / bits]
        body("Reshape", ["zeros_parts", "matrix"], "padded_zeros")  # [N, G], or one more
        body("Shape", ["scales"], "blocks", start=1, end=2)
        for name, axis in {"from": 0, "second": 1}.items():
            body.ints(name, axis)
        body("Slice", ["padded_zeros", "from", "blocks", "second"], "points")
    else:
        body("Shape", ["scales"], "blocks_shape")
        body("Expand", ["half", "blocks_shape"], "points")  # [N, G]
    body("DequantizeLinear", ["numbers", "scales", "points"], "w", refs={"block_size": "block_size"}, axis=1)
    body("Transpose", ["w"], "w_transposed", perm=[1, 0])
    body("MatMul", ["x", "w_transposed"], MATMUL_OUTPUT)
    return body.function({"": OPSET}, MATMUL_INPUTS if zeros else MATMUL_INPUTS[:-1])


def gather(eight: bool = False) -> FunctionProto:
    """Only the rows that are looked up become wide. With `eight` all calls are of eight bits: there is nothing to unpack."""
    body = Body(_GATHER)
    numbers, behind = body("Gather", ["values", "indices"], "packed"), [-1]  # [B, S, G, block * bits / 8]
    if eight:
        body("Constant", [], "half", value=numpy_helper.from_array(np.array(128, np.uint8)))
    else:
        shifts(body)
        numbers, behind = unpack(body, "packed", "numbers"), [-1, -2]  # [B, S, G, block * bits / 8, 8 / bits]
    body("CastLike", [numbers, "scales"], "positive")
    body("CastLike", ["half", "scales"], "wide_half")
    body("Sub", ["positive", "wide_half"], "signed")
    body("Gather", ["scales", "indices"], "scales_of_rows")  # [B, S, G]
    body.ints("behind", *behind)
    body("Unsqueeze", ["scales_of_rows", "behind"], "scales_of_blocks")
    body("Mul", ["signed", "scales_of_blocks"], "wide")
    body.ints("rows_shape", 0, 0, -1)
    body("Reshape", ["wide", "rows_shape"], GATHER_OUTPUT)
    return body.function({"": OPSET}, GATHER_INPUTS)


def onnxruntime_rounded_matmul() -> FunctionProto:
    """ONNX Runtime's product of integers, which gives floats at once."""
    body = Body(_ROUNDED)
    _round_rows(body)
    inputs = ["u", "values", "step", "scales", "middle"]
    body("MatMulIntegerToFloat", inputs, "of_rows", domain="com.microsoft")
    body("Mul", ["of_rows", "largest"], MATMUL_OUTPUT)
    return body.function({"": OPSET, "com.microsoft": 1}, ROUNDED_INPUTS)


def standard_rounded_matmul() -> FunctionProto:
    """MatMulInteger."""
    body = Body(_ROUNDED)
    _round_rows(body)
    body("MatMulInteger", ["u", "values", "middle"], "sums")
    body("CastLike", ["sums", "x"], "of_integers")
    body("Mul", ["scales", "step"], "steps")
    body("Mul", ["of_integers", "steps"], "of_rows")
    body("Mul", ["of_rows", "largest"], MATMUL_OUTPUT)
    return body.function({"": OPSET}, ROUNDED_INPUTS)


def exact_rounded_matmul(late: bool = False) -> FunctionProto:
    """x as it is, by the same matrix; for `late` see `_values`."""
    body = Body(_ROUNDED)
    body("CastLike", [_values(body, late, first=True), "x"], "numbers")
    body("Mul", ["numbers", "scales"], "w")
    body("MatMul", ["x", "w"], MATMUL_OUTPUT)
    return body.function({"": OPSET}, ROUNDED_INPUTS)


def float8_matmul(late: bool = False) -> FunctionProto:
    """Standard ops, for all; for `late` see `_values`.

    No DequantizeLinear: ONNX Runtime makes a matrix wide once while it loads, and that at every call.
    """
    body = Body(_FLOAT8)
    body.ints("second", 1)
    body("CastLike", [_values(body, late, first=False), "x"], "numbers")
    body("Unsqueeze", ["scales", "second"], "of_rows")  # [N, 1]
    body("Mul", ["numbers", "of_rows"], "w")
    body("Transpose", ["w"], "w_transposed", perm=[1, 0])
    body("MatMul", ["x", "w_transposed"], MATMUL_OUTPUT)
    return body.function({"": OPSET}, ROUNDED_INPUTS)


def _values(body: Body, late: bool, first: bool) -> str:
    """The values, whose `first` axis or last is K; if `late` in a shape that x gives them, so that they wait for it.

    All matrices of a model would be wide at once otherwise, where ONNX Runtime folds no constants.
    """
    if not late:
        return "values"
    body.ints("rest", -1)
    body("Shape", ["x"], "columns", start=-1)
    body("Concat", ["columns", "rest"] if first else ["rest", "columns"], "matrix", axis=0)
    return body("Reshape", ["values", "matrix"], "late_values")


def _round_rows(body: Body) -> None:
    """`u`, uint8, of x; `largest`, of each row; `step` and `middle`, of its scale: 1 / 127 and 128."""
    for name, value in (("step", np.float32(1 / 127)), ("middle", np.uint8(128)), ("smallest", np.float32(SMALLEST))):
        body("Constant", [], name, value=numpy_helper.from_array(np.array(value)))
    body.ints("last_axis", -1)
    body("Abs", ["x"], "sizes")
    body("ReduceMax", ["sizes", "last_axis"], "largest_size")
    body("Max", ["largest_size", "smallest"], "largest")
    body("Div", ["x", "largest"], "within_one")
    body("QuantizeLinear", ["within_one", "step", "middle"], "u")


def shifts(body: Body) -> None:
    """What `unpack` needs: `shifts` to the right, a `mask`, and `half` of the numbers' range; uint8."""
    body("Constant", [], "bits_of_it", refs={"value_int": "bits"})
    for name, value in {"zero": 0, "one": 1, "two": 2, "eight": 8}.items():
        body("Constant", [], name, value=numpy_helper.from_array(np.array(value)))
    body("Range", ["zero", "eight", "bits_of_it"], "int_shifts")  # [0] or [0, 4]
    body("Cast", ["int_shifts"], "shifts", to=TensorProto.UINT8)
    body("Pow", ["two", "bits_of_it"], "range")
    body("Sub", ["range", "one"], "largest")
    body("Cast", ["largest"], "mask", to=TensorProto.UINT8)
    body("Div", ["range", "two"], "int_half")
    body("Cast", ["int_half"], "half", to=TensorProto.UINT8)
    body.ints("last", -1)


def unpack(body: Body, packed: str, numbers: str) -> str:
    """From bytes the numbers in them, lower bits first, uint8 with an axis more."""
    body("Unsqueeze", [packed, "last"], f"{packed}_column")
    body("BitShift", [f"{packed}_column", "shifts"], f"{packed}_shifted", direction="RIGHT")
    return body("BitwiseAnd", [f"{packed}_shifted", "mask"], numbers)
