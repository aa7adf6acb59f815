"""A quantized tensor in its parts, as a checkpoint has them, and the one formula that makes it floats again.

weight[n, k] = (values[n, k] - zeros[i, g]) * scales[i, g] + offsets[i, g]    i = n // rows,  g = k // columns, or groups[k]
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """See module. The last two axes are rows and columns of a weight; experts may come before them.

    Attributes:
        values: [..., N, K]; int8, uint8, or 8-bit floats.
        scales: [..., rows of blocks, columns of blocks], of a float dtype.
        zeros: as the scales, integers of the dtype of `values`; None for zero.
        block: how many rows and columns have a scale together.
        groups: [K], the column of blocks that a column is of, where these do not follow one another (GPTQ's act-order).
        bits: of a value: what it could be stored in.
        offsets: as the scales (GGUF's minima); None for zero.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: tuple[int, int]
    bits: int
    groups: Tensor | None = None
    offsets: Tensor | None = None

    def dequantize(self) -> Tensor:
        """In float32: each product and each sum is rounded once, and a product not at all where integers have 16-bit scales."""
        values = self.values.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros.float())
        values.mul_(self._spread(self.scales.float()))
        return values if self.offsets is None else values.add_(self._spread(self.offsets.float()))

    def _spread(self, x: Tensor) -> Tensor:
        """One for each value, or one that broadcasts."""
        rows, columns = self.values.shape[-2:]
        if x.shape[-2] > 1 and self.block[0] > 1:
            x = x.repeat_interleave(self.block[0], -2)[..., :rows, :]
        if self.groups is not None:
            return x[..., self.groups]
        return x.repeat_interleave(self.block[1], -1)[..., :columns] if x.shape[-1] > 1 else x


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of 2, 4 or 8 bits from integers of any size, along the last axis, the lowest bits first: uint8."""
    octets = words.contiguous().view(torch.uint8)
    parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)
