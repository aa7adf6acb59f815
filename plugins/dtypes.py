"""Every dtype that headfold stores, and what each library calls it: the one table of them.

Keys are numpy's names. Nothing is imported here: every library is told by name or number.
"""

from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["float32", "float16", "bfloat16"]  # of weights, logits and activations
Quantized = Literal["int8", "float8_e4m3fn"]  # of a quantized KV cache


@dataclass(frozen=True)
class Names:
    """One dtype: bytes of an element, and its name elsewhere."""

    size: int
    onnx: int  # TensorProto.DataType
    onnxruntime: str  # in "tensor(...)"
    tensorrt: str  # member of trt.DataType
    triton: str
    numpy: str  # where numpy has none, that of its bits


DTYPES: dict[str, Names] = {
    "float32": Names(4, 1, "float", "FLOAT", "fp32", "float32"),
    "float16": Names(2, 10, "float16", "HALF", "fp16", "float16"),
    "bfloat16": Names(2, 16, "bfloat16", "BF16", "bf16", "uint16"),
    "int8": Names(1, 3, "int8", "INT8", "i8", "int8"),
    "float8_e4m3fn": Names(1, 17, "float8e4m3fn", "FP8", "fp8e4nv", "uint8"),
    "int32": Names(4, 6, "int32", "INT32", "i32", "int32"),
    "int64": Names(8, 7, "int64", "INT64", "i64", "int64"),
    "bool": Names(1, 9, "bool", "BOOL", "i1", "bool"),
}
FLOATS: tuple[DType, ...] = ("float32", "float16", "bfloat16")
QUANTIZED: dict[Quantized, tuple[float, float]] = {  # and the least and the largest number each stores
    "int8": (-128.0, 127.0),
    "float8_e4m3fn": (-448.0, 448.0),
}


def from_tensorrt(dtype: Any) -> str:
    """The name of a trt.DataType, of TensorRT or TensorRT-RTX."""
    member = str(dtype).rpartition(".")[2]
    return next(name for name, names in DTYPES.items() if names.tensorrt == member)


def from_onnxruntime(kind: str) -> str:
    """The name of what ONNX Runtime calls "tensor(float16)"."""
    return next(name for name, names in DTYPES.items() if f"tensor({names.onnxruntime})" == kind)
