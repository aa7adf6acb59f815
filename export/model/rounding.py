"""Weights of few bits in blocks along the input dimension: what they are, and the rule that rounds to them.

The rule is symmetric. What a checkpoint holds in few bits already may have other blocks, zero points or offsets.
Of seven bits, a block is all weights of an output, and the inputs of their product are rounded, too: see
`headfold.plugins.quantized.schema`, which also says why they are not eight. So it is of float8, whose inputs stay as they are.
Of float4 (NVFP4) a block is 16 weights, and its scale is a float8 times a power of two that the tensor's blocks share. Twice a number
is an integer, and stored so, in a byte: products of eight bits compute with it everywhere, and TensorRT is given the four bits.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor

from headfold.plugins.quantized.schema import BLOCK, FLOAT4_BLOCK, SMALLEST
from headfold.runtime.manifest import WeightsScheme

# Bits of a number, an integer; or a float of eight: e4m3fn (Micikevicius et al. 2022); or of four: e2m1 (Rouhani et al. 2023)
Width = Literal[4, 7, 8, "float8", "float4"]


@dataclass(frozen=True)
class Form:
    """How a weight is stored; products of weights of one form can be joined into one."""

    bits: Width
    block: int = BLOCK  # weights that share a scale
    zeros: bool = False  # whether its blocks have zero points
    offsets: bool = False
    order: str | None = None  # of the columns, by name; None where they are stored as they come
    transposed: bool = False  # in the checkpoint: some experts' matrices are [E, K, N] there
    narrow: bool = False  # whether its scales are numbers of float16, and stored so, in a graph of a wider dtype
    wide_rows: int = 0  # so many of its first rows have eight bits, the others four, and are stored apart

    def pieces(self, shape: tuple[int, ...]) -> list[tuple[Self, tuple[int, ...]]]:
        """What is stored apart of a weight of this shape, rows of one width each."""
        if not self.wide_rows:
            return [(self, shape)]
        wide, others = replace(self, bits=8, wide_rows=0), replace(self, wide_rows=0)
        return [(wide, (self.wide_rows, shape[1])), (others, (shape[0] - self.wide_rows, shape[1]))]

    def size(self, shape: tuple[int, ...]) -> int:
        """Bits of all numbers of a weight of this shape; scales not counted."""
        return sum(bit_count(form.bits) * math.prod(part) for form, part in self.pieces(shape))

    @property
    def by_output(self) -> bool:
        """Whether all weights of an output share a scale."""
        return is_by_output(self.bits)


@dataclass(frozen=True)
class Rounded:
    """A weight of K / G stored columns in each block g, one after the other: stored column j is column k = order[j].

    Those of experts have an axis before, one matrix for each; they have no zeros, offsets or order.
    w[n, k] = (values[n, j] - zeros[n, g]) * scales[n, g] + offsets[n, g].
    """

    bits: Width
    values: Tensor  # int8 [(E,) N, K], of as many bits; or float8_e4m3fn; of float4 twice the numbers
    scales: Tensor  # float32 [(E,) N, G]
    zeros: Tensor | None = None  # as the values [N, G]; None: 0
    offsets: Tensor | None = None  # as the scales; None: 0
    order: Tensor | None = None  # int64 [K]; None: j
    transposed: bool = False  # see Form
    wide_rows: int = 0  # see Form

    @property
    def form(self) -> Form:
        """What of it the graph must know, but for how its scales are stored."""
        block = self.values.shape[-1] // self.scales.shape[-1]
        order = hashlib.sha256(self.order.numpy().tobytes()).hexdigest()[:16] if self.order is not None else None
        more = self.zeros is not None, self.offsets is not None, order, self.transposed
        return Form(self.bits, block, *more, wide_rows=self.wide_rows)

    def rows(self, own: slice | Tensor) -> Self:
        """Some of its rows, of a weight [N, K]; what they stand for, not where those of eight bits end."""
        zeros, offsets = (None if part is None else part[own] for part in (self.zeros, self.offsets))
        return replace(self, values=self.values[own], scales=self.scales[own], zeros=zeros, offsets=offsets)

    def pieces(self) -> list[Self]:
        """Those of its form."""
        if not self.wide_rows:
            return [self]
        values, scales = (torch.tensor_split(part, [self.wide_rows]) for part in (self.values, self.scales))
        each = zip((8, self.bits), values, scales, strict=True)
        return [replace(self, bits=bits, values=x, scales=steps, wide_rows=0) for bits, x, steps in each]


_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max  # 448
_LARGEST_FLOAT4 = 12  # twice 6: numbers of float4 are doubled here
_LEAST_NARROW = 2.0**-18  # float16's step is 2^-24 there
_MOST_NARROW = 2.0**10  # of scales of eight bits: those of four are 16 times as large, and float16's largest is 2^16
_AT_A_TIME = 1 << 23  # of a weight's numbers that are rounded or compared
# In eight bits but of "mixed": four there cost most (issue 13, measured)
_WIDE = ("model.embed_tokens.weight", "lm_head.weight")
_WIDTHS: dict[WeightsScheme, Width] = {"int8": 8, "w8a8": 7, "fp8": "float8", "nvfp4": "float4", "int4": 4, "mixed": 4}


def bit_count(width: Width) -> int:
    """Of a number."""
    return int(width[-1]) if isinstance(width, str) else width


def is_by_output(bits: Width) -> bool:
    """Whether all weights of an output share a scale; then they need no whole blocks."""
    return bits in (7, "float8")


def bits_of(
    shapes: Mapping[str, tuple[int, ...]], scheme: WeightsScheme, wide: Collection[str] = _WIDE
) -> dict[str, Width]:
    """Which of a decoder's tensors are rounded, and to how many bits: its matrices, [out, in], that have whole blocks, and experts'.

    (Where outputs have a scale each none are needed, and there are no experts, nor of float4.) Those that are `wide` have eight. Of
    "mixed" this is the least that they can have, four for all.
    """
    eight = () if scheme == "mixed" else wide
    ranks = (2, 3) if _WIDTHS[scheme] in (4, 8) else (2,)
    widths = {name: 8 if name in eight else _WIDTHS[scheme] for name, shape in shapes.items() if len(shape) in ranks}
    # An expert's inputs are either of its axes
    whole = {name for name, shape in shapes.items() if all(size % BLOCK == 0 for size in shape[1:])}
    return {name: width for name, width in widths.items() if is_by_output(width) or name in whole}


def form_of(bits: Width, columns: int, block: int = BLOCK) -> Form:
    """What the rule gives a weight with so many columns: blocks of the largest power of two up to `block` that divides them.

    Of float4 they are of 16.
    """
    block = FLOAT4_BLOCK if bits == "float4" else block
    return Form(bits, columns if is_by_output(bits) else math.gcd(columns, block))


def forms_of(
    bits: Mapping[str, Width],
    shapes: Mapping[str, tuple[int, ...]],
    block: int = BLOCK,
    transposed: Collection[str] = (),
    narrow: Collection[str] = (),
    wide_rows: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Form]:
    """What the rule gives weights of these shapes; experts have blocks of `BLOCK`. For `transposed`, `narrow`, `wide_rows` see Form."""
    forms = {}
    for name, width in bits.items():
        *experts, _, columns = shapes[name]
        form = form_of(width, columns, BLOCK if experts else block)
        rows = wide_rows.get(name, 0)
        forms[name] = replace(form, transposed=name in transposed, narrow=name in narrow, wide_rows=rows)
    return forms


def suits_narrow_scales(weight: Tensor) -> bool:
    """Whether float16 holds the scales of a weight [N, K] well, for four bits or eight: each within a 128th of itself, a step of eight.

    Small blocks count as much as large ones: what comes of them may be multiplied by anything.
    """
    for rows in torch.split(weight, _at_a_time(weight)):
        scales = block_scales(rows.float().reshape(len(rows), -1, math.gcd(weight.shape[1], BLOCK)), 8)
        if scales.min() < _LEAST_NARROW or scales.max() > _MOST_NARROW:
            return False
    return True


def rounded(
    weight: Tensor,
    bits: Width,
    scales: torch.dtype = torch.float32,
    transposed: bool = False,
    block: int = BLOCK,
    wide_rows: int = 0,
    unit: float | None = None,
) -> Rounded:
    """The nearest numbers, and the scales of their blocks, of a weight [N, K]; of experts [E, N, K], or `transposed` [E, K, N].

    Blocks are as `form_of` has them; for `wide_rows`, of a weight [N, K] alone, see Form.

    In eight bits the scale is the block's largest magnitude over 127; in four its extreme, with its sign, over -8, so that all 16
    numbers are used (both as in ggml's reference quantization); in seven an output's largest magnitude over 63, in float8 over 448; in
    float4 a block's over 6. A block of zeros has scale 1. `scales` is the dtype that holds these, a graph's, whose smallest number is
    the least scale. `unit` is the weight's, if these are only some of its rows: see `unit_of`.
    """
    if wide_rows:
        widths = zip(torch.tensor_split(weight, [wide_rows]), (8, bits), strict=True)
        return joined([rounded(rows, width, scales, block=block) for rows, width in widths])
    if weight.dim() == 3:  # one after the other: what is wide in between is one of them
        each = [rounded(expert, bits, scales, block=block) for expert in (weight.mT if transposed else weight)]
        values, found = torch.stack([expert.values for expert in each]), torch.stack([expert.scales for expert in each])
        return Rounded(bits, values, found, transposed=transposed)

    unit = unit_of(weight, bits, scales) if unit is None else unit

    def nearest_rows(rows: Tensor) -> Rounded:
        blocks = rows.float().reshape(len(rows), -1, form_of(bits, weight.shape[1], block).block)  # [N, G, block]
        found = block_scales(blocks, bits, scales, unit)
        kind = torch.float8_e4m3fn if bits == "float8" else torch.int8
        return Rounded(bits, nearest(blocks, found[..., None], bits).to(kind).flatten(1), found)

    return in_parts(weight, nearest_rows)


def as_rounded(
    weight: Tensor,
    bits: Width,
    scales: torch.dtype = torch.float32,
    transposed: bool = False,
    block: int = BLOCK,
    wide_rows: int = 0,
) -> Tensor:
    """What those numbers stand for, float32, as the weight; by rows, so that the numbers are never all there."""
    if weight.dim() == 3:
        return restored(rounded(weight, bits, scales, transposed, block))
    found, most, unit = torch.empty(weight.shape), _at_a_time(weight), unit_of(weight, bits, scales)
    widths: tuple[tuple[Width, slice], ...] = ((8, slice(wide_rows)), (bits, slice(wide_rows, None)))
    for width, rows in widths if wide_rows else widths[1:]:
        for own, part in zip(torch.split(found[rows], most), torch.split(weight[rows], most), strict=True):
            own.copy_(restored(rounded(part, width, scales, block=block, unit=unit)))
    return found


def joined(pieces: Sequence[Rounded]) -> Rounded:
    """The rows of one piece, or of some in eight bits and others, end to end: see Form."""
    if len(pieces) == 1:
        return pieces[0]
    wide, others = pieces
    values, scales = torch.cat((wide.values, others.values)), torch.cat((wide.scales, others.scales))
    return Rounded(others.bits, values, scales, wide_rows=len(wide.values))


def in_parts(weight: Tensor, round_rows: Callable[[Tensor], Rounded]) -> Rounded:
    """A weight [N, K] rounded by rows that know nothing of each other, so many at a time that what is wide in between is small.

    What makes them gives numbers and scales alone.
    """
    most = _at_a_time(weight)
    first = round_rows(weight[:most])
    values, scales = (x.new_empty(len(weight), x.shape[1]) for x in (first.values, first.scales))
    for row in range(0, len(weight), most):  # filled: put end to end at last, they would all be there twice
        part = round_rows(weight[row : row + most]) if row else first
        values[row : row + most], scales[row : row + most] = part.values, part.scales
    return Rounded(first.bits, values, scales)


def unit_of(weight: Tensor, bits: Width, dtype: torch.dtype) -> float:
    """What the scales of a weight of float4 are float8_e4m3fn times, from 1 to 448, so that `dtype` holds them; of another weight 1.

    Scales have room up to twice the largest that the nearest numbers have. TensorRT wants the float8, and has smaller ones, too:
    weights whose units are not far apart can be one matrix.
    """
    largest = weight.abs().max().item() / _LARGEST_FLOAT4 if bits == "float4" else 0.0
    if not 0 < largest < math.inf:
        return 1.0
    least = -21 if dtype == torch.float16 else -100  # three bits of a float8 behind its first are multiples of 2^-24
    return 2.0 ** max(math.ceil(math.log2(2 * largest / _LARGEST_FLOAT8)), least)


def block_scales(blocks: Tensor, bits: Width, dtype: torch.dtype = torch.float32, unit: float = 1.0) -> Tensor:
    """The scales [...] of blocks [..., block]; see `rounded`, and `unit_of`."""
    largest = blocks.abs().amax(-1) if bits != 4 else blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    most = {8: 127, 7: 63, 4: -8, "float8": _LARGEST_FLOAT8, "float4": _LARGEST_FLOAT4}[bits]
    exact = largest / most
    scales = held_scales(exact, bits, dtype, unit)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of a block that is not all zeros
    return torch.where(scales != 0, scales, torch.where(exact == 0, 1.0, torch.full_like(exact, least).copysign(exact)))


def held_scales(scales: Tensor, bits: Width, dtype: torch.dtype, unit: float) -> Tensor:
    """The nearest ones that a graph can have, in the dtype that they have."""
    if bits == "float4":
        scales = (scales / unit).clamp(1, _LARGEST_FLOAT8).to(torch.float8_e4m3fn).to(scales.dtype) * unit
    return scales.to(dtype).to(scales.dtype)


def nearest(weights: Tensor, scales: Tensor, bits: Width) -> Tensor:
    """The nearest numbers that `bits` have, in the dtype of the weights; scales broadcast."""
    if bits == "float8":
        in_range = (weights / scales).clamp_(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
        return in_range.to(torch.float8_e4m3fn).to(weights.dtype)
    if bits == "float4":  # twice 0, 0.5, 1, 1.5, 2, 3, 4, 6: ties to the one whose last bit is 0, as IEEE 754 has it
        doubled = (weights / scales).clamp_(-_LARGEST_FLOAT4, _LARGEST_FLOAT4)
        steps = torch.ones_like(doubled).masked_fill_(doubled.abs() >= 4, 2).masked_fill_(doubled.abs() >= 8, 4)
        return doubled.div_(steps).round_().mul_(steps)
    half = 1 << (bits - 1)
    return (weights / scales).round_().clamp_(-half, half - 1)


def restored(rounding: Rounded) -> Tensor:
    """What it stands for, float32, as the checkpoint has its axes: every operation is rounded, none of them twice."""
    blocks = rounding.values.float().view(*rounding.scales.shape, -1)
    if rounding.zeros is not None:
        blocks = blocks - rounding.zeros.float()[..., None]
    blocks *= rounding.scales[..., None]
    if rounding.offsets is not None:
        blocks = blocks + rounding.offsets[..., None]
    columns = blocks.flatten(-2)
    if rounding.transposed:
        return columns.mT
    return columns if rounding.order is None else columns[:, rounding.order.argsort()]


def holds(rounding: Rounded, weight: Tensor) -> bool:
    """Whether it stands for exactly these numbers."""
    return all(torch.equal(now, rows.float()) for now, rows in by_rows(rounding, weight))


def by_rows(rounding: Rounded, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What it stands for, float32, beside a weight, some rows [n, K] at a time; of experts one after the other."""
    most = _at_a_time(weight)
    if weight.dim() == 3:
        for now, expert in zip(restored(rounding), weight, strict=True):
            yield from zip(torch.split(now, most), torch.split(expert, most), strict=True)
    else:
        for start, rows in zip(range(0, len(weight), most), torch.split(weight, most), strict=True):
            yield restored(rounding.rows(slice(start, start + most))), rows


def _at_a_time(weight: Tensor) -> int:
    """Rows of a weight [(E,) N, K], at least one."""
    return max(_AT_A_TIME // weight.shape[-1], 1)


def rounded_rows(x: Tensor) -> Tensor:
    """What a product with rounded inputs sees of x [..., K]."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x / largest * 127).round() * (largest / 127)
