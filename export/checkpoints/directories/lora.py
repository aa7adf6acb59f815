"""What a low-rank adapter makes of a weight (Hu et al. 2021; DoRA: Liu et al. 2024), by peft's arithmetic, in wider numbers.

The product is the same bits on every machine, in whatever order it is summed: so a bundle of it can be verified anywhere.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headfold.export.checkpoints.directories.stored import Source, Stored

_ROWS = 1024


@dataclass(frozen=True)
class LowRank:
    """A weight with an adapter merged into it: W + scaling * B A; a Source.

    Attributes:
        base: W [out, in]; with `transposed` [in, out], as embeddings [vocabulary, hidden] are, too.
        a: A [r, in].
        b: B [out, r].
        magnitude: of DoRA, [out]: the length of each row of the result.
    """

    base: Source
    a: Stored
    b: Stored
    scaling: float
    transposed: bool = False
    magnitude: Stored | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """See Source."""
        return self.base.shape

    def read(self) -> Tensor:
        """See Source; rounded once, from float64, in which some rows are at a time."""
        a, b, base = self.a.read(), self.b.read(), self.base.read()
        if self.transposed:
            base = base.mT
        merged = torch.empty(base.shape)
        magnitude = self.magnitude.read().double().flatten() if self.magnitude is not None else None
        for start in range(0, len(b), _ROWS):
            rows = slice(start, start + _ROWS)
            wide = product(b[rows], a).mul_(self.scaling).add_(base[rows])
            if magnitude is not None:
                wide *= (magnitude[rows] / _lengths(wide))[:, None]
            merged[rows] = wide
        return (merged.mT if self.transposed else merged).contiguous()

    def quantized(self) -> None:
        """See Source: it is stored nowhere."""
        return None


def without_adapter(source: Source) -> Source:
    """What a tensor is before an adapter is merged into it."""
    return source.base if isinstance(source, LowRank) else source


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A in float64, to about 40 bits of each row's largest number times each column's.

    Both are cut into slices of so few bits that no sum of their products is rounded (Ozaki et al. 2012).
    """
    bits = (53 - max(a.shape[0] - 1, 1).bit_length()) // 2
    b_high, b_low = _slices(b.double(), 1, bits)
    a_high, a_low = _slices(a.double(), 0, bits)
    return (b_high @ a_high).add_(b_high @ a_low).add_(b_low @ a_high)


def _slices(x: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
    """Two tensors of `bits` bits each, counted from the largest number along the axis, whose sum is x to twice as many."""
    largest = torch.frexp(x.abs().amax(axis, keepdim=True)).exponent.numpy()
    unit, finer = (torch.from_numpy(np.ldexp(1.0, largest - part * bits)) for part in (1, 2))
    high = (x / unit).round() * unit
    return high, ((x - high) / finer).round() * finer


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean length of each row, [out], summed in one order: halves, and halves of halves."""
    squares = x.square()
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        rest = squares[:, 2 * half :]
        squares = torch.cat((squares[:, :half] + squares[:, half : 2 * half], rest), 1)
    return squares.sqrt()[:, 0]
