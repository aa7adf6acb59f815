"""Blocks of quantized GGUF tensors in their parts: numbers, scales, minima. Layouts are those of ggml's `ggml-common.h`.

Which kinds are here is said by `blocks_of`; what others stand for the `gguf` package knows.
"""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from headfold.export.checkpoints.quantized.tensor import QuantizedTensor

Bytes = NDArray[np.uint8]
Array = NDArray[Any]
# numbers [B, 32 or 256], scales [B, parts], minima likewise or None, all of B blocks; and the bits of a number
Parts = tuple[Array, Array, Array | None, int]
_Kind = gguf.GGMLQuantizationType


def blocks_of(tensor: gguf.ReaderTensor) -> QuantizedTensor | None:
    """A tensor [N, K] in its parts; None where its kind is not among these."""
    read = _KINDS.get(tensor.tensor_type)
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    if read is None:
        return None
    count, size = rows.shape[0], gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    with np.errstate(all="ignore"):  # whoever needs numbers says which tensor holds none
        values, scales, minima, bits = read(np.ascontiguousarray(rows).reshape(-1, size))
    block = values.shape[1] // scales.shape[1]

    def of_rows(x: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x).reshape(count, -1))

    offsets = of_rows(minima) if minima is not None else None
    return QuantizedTensor(of_rows(values), of_rows(scales), None, (1, block), bits, offsets=offsets)


def _half(blocks: Bytes, start: int) -> Array:
    """A float16 of each block, as float32 [B, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Of bytes [..., n] first the lower halves, then the higher ones, [..., 2 n]."""
    return np.concatenate((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """Of 32 bits from there each as 0 or 16, [B, 32]."""
    bits = np.unpackbits(blocks[:, start : start + 4], -1, bitorder="little")
    return bits * np.uint8(16)


def _q4_0(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8), _half(blocks, 0), None, 4


def _q4_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), 4


def _q5_0(blocks: Bytes) -> Parts:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return numbers.astype(np.int8) - np.int8(16), _half(blocks, 0), None, 5


def _q5_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2), 5


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None, 8


def _scales_and_minima(blocks: Bytes) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K, each [B, 8]: six bits each, packed into twelve bytes, times a float16 of the block."""
    first, second, third = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), -1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q4_k(blocks: Bytes) -> Parts:
    numbers = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return numbers, *_scales_and_minima(blocks), 4


def _q5_k(blocks: Bytes) -> Parts:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [B, 8, 32]
    numbers = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | high << 4
    return numbers.reshape(-1, 256), *_scales_and_minima(blocks), 5


def _q6_k(blocks: Bytes) -> Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    numbers = (low | high << 4).astype(np.int8) - np.int8(32)
    return numbers.reshape(-1, 256), _half(blocks, 208) * blocks[:, 192:208].view(np.int8), None, 6


_KINDS: dict[gguf.GGMLQuantizationType, Callable[[Bytes], Parts]] = {
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
    _Kind.Q5_0: _q5_0,
    _Kind.Q5_1: _q5_1,
    _Kind.Q8_0: _q8_0,
    _Kind.Q4_K: _q4_k,
    _Kind.Q5_K: _q5_k,
    _Kind.Q6_K: _q6_k,
}
