"""Weights quantized and packed number by number, as each format's own specification says; and the floats that they stand for.

Each function takes a weight [N, K] and gives the stored tensors by the end of their names, and what they are exactly.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs the places of a word hold, from the lowest bits


def packed(numbers: np.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    """Unsigned numbers [R, C] in words along the second axis, lowest bits first."""
    per = 32 // bits
    rows, columns = numbers.shape
    words = np.zeros((rows, -(-columns // per)), np.uint32)
    for column in range(columns):
        place = (order or list(range(per))).index(column % per)
        words[:, column // per] |= numbers[:, column].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def groups(columns: int, size: int, shuffled: bool = False) -> np.ndarray:
    group = np.arange(columns) // size
    return np.random.default_rng(0).permutation(group) if shuffled else group


def rounded(weight: Tensor, bits: int, group: np.ndarray, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Unsigned integers [N, K], float16 scales and integer zero points [N, G]: the usual formulas."""
    w, most = weight.double().numpy(), 2**bits - 1
    count = group.max() + 1
    scales, zeros = np.zeros((len(w), count), np.float16), np.zeros((len(w), count), np.int64)
    for g in range(count):
        part = w[:, group == g]
        low, high = part.min(1), part.max(1)
        if symmetric:
            scales[:, g], zeros[:, g] = 2 * np.abs(part).max(1) / most, 2 ** (bits - 1)
        else:
            scales[:, g] = (np.maximum(high, 0) - np.minimum(low, 0)) / most
            zeros[:, g] = np.clip(np.round(-np.minimum(low, 0) / scales[:, g]), 0, most)
    values = np.clip(np.round(w / scales[:, group].astype(float)) + zeros[:, group], 0, most).astype(np.int64)
    return values, scales, zeros


def exact(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray) -> Tensor:
    numbers = (values - zeros[:, group]).astype(np.float64) * scales.astype(np.float64)[:, group]
    assert (numbers == numbers.astype(np.float32)).all()  # nothing is rounded
    return torch.from_numpy(numbers.astype(np.float32))


def gptq(bits: int, size: int, symmetric: bool, version: int, act_order: bool) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        group = groups(weight.shape[1], size if size > 0 else weight.shape[1], act_order)
        values, scales, zeros = rounded(weight, bits, group, symmetric)
        if not symmetric:
            zeros[0] = 0  # which version 1 stores as the largest number
            values[0] = np.clip(values[0], 0, 2**bits - 1)
        kept = (zeros - 1) % 2**bits if version == 1 else zeros
        parts = {
            ".qweight": packed(values, bits).T.contiguous(),
            ".qzeros": packed(kept.T, bits),
            ".scales": torch.from_numpy(scales.T.copy()),
            ".g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return parts, exact(values, scales, zeros, group)

    return store


def awq(size: int) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        group = groups(weight.shape[1], size)
        values, scales, zeros = rounded(weight, 4, group, symmetric=False)
        parts = {
            ".qweight": packed(values.T, 4, AWQ_ORDER),
            ".qzeros": packed(zeros.T, 4, AWQ_ORDER),
            ".scales": torch.from_numpy(scales.T.copy()),
        }
        return parts, exact(values, scales, zeros, group)

    return store


def float8(block: tuple[int, int] | None) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        rows, columns = block or weight.shape
        grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(1)) / 16 + 0.01
        wide = torch.empty(weight.shape)
        for n in range(weight.shape[0]):
            for k in range(weight.shape[1]):
                wide[n, k] = scales[n // rows, k // columns]
        values = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {".weight": values, ".weight_scale_inv": scales if block else scales.reshape(())}
        return stored, values.float() * wide

    return store


def mxfp4(weight: Tensor) -> Stored:
    """Of experts [E, K, N]: blocks [E, N, K / 32, 16], as gpt_oss has them."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    w = weight.mT.double().numpy()
    w = w.reshape(*w.shape[:2], -1, 32)
    exponents = np.floor(np.log2(np.abs(w).max(-1))) - 2
    nibbles = np.abs(w[..., None] / 2.0 ** exponents[..., None, None] - numbers).argmin(-1)
    values = (numbers[nibbles] * 2.0 ** exponents[..., None]).reshape(*weight.mT.shape)
    octets = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).astype(np.uint8)
    parts = {"_blocks": torch.from_numpy(octets), "_scales": torch.from_numpy((exponents + 127).astype(np.uint8))}
    return parts, torch.from_numpy(values).float().mT
