"""Matrices of four and eight bits in plain numpy: the oracle of every body. Shapes are those of `headfold.plugins.quantized.schema`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.quantized.schema import SMALLEST, Bits

Array = NDArray[Any]


def unpacked(values: Array, bits: Bits) -> Array:
    """The signed numbers, int64 [N, K]; of zero points [N, G], or one more where G is odd."""
    numbers = values if bits == 8 else np.stack((values & 15, values >> 4), -1)
    return numbers.reshape(len(values), -1).astype(np.int64) - (1 << (bits - 1))


def dequantized(values: Array, scales: Array, bits: Bits, zeros: Array | None = None) -> Array:
    """W, float64 [N, K]."""
    numbers = unpacked(values, bits).reshape(*scales.shape, -1)
    if zeros is not None:
        numbers = numbers - unpacked(zeros, bits)[:, : scales.shape[1], None]
    return (numbers * scales.astype(np.float64)[..., None]).reshape(len(values), -1)


def quantized_matmul(x: Array, values: Array, scales: Array, bits: Bits, zeros: Array | None = None) -> Array:
    """x @ W.T, computed in float64, in the dtype of x."""
    product: Array = x.astype(np.float64) @ dequantized(values, scales, bits, zeros).T
    return product.astype(x.dtype)


def quantized_gather(values: Array, scales: Array, indices: Array, bits: Bits) -> Array:
    """W[indices], in the dtype of the scales."""
    return dequantized(values, scales, bits)[indices].astype(scales.dtype)


def float8_matmul(x: Array, values: Array, scales: Array) -> Array:
    """The product with values of ml_dtypes' float8_e4m3fn, computed in float64, in the dtype of x."""
    w = values.astype(np.float64) * scales.astype(np.float64)[:, None]
    product: Array = x.astype(np.float64) @ w.T
    return product.astype(x.dtype)


def rounded_rows(x: Array) -> tuple[Array, Array]:
    """u - 128 of each row, int64 [..., K], and m / 127, float64 [..., 1]."""
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), SMALLEST).astype(np.float64)
    return np.rint(x / largest * 127).astype(np.int64), largest / 127


def rounded_matmul(x: Array, values: Array, scales: Array) -> Array:
    """The product of the rounded rows, in the dtype of x."""
    numbers, steps = rounded_rows(x)
    product: Array = (numbers @ values.astype(np.int64)) * scales.astype(np.float64) * steps
    return product.astype(x.dtype)
