"""What a checkpoint holds in few bits already, as a graph can hold it: the same numbers, so that nothing is rounded twice.

A form is taken only if it restores every weight of the tensor bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.model.rounding import Form, Rounded, Width, holds, is_by_output
from headfold.plugins.quantized.schema import LARGEST_BLOCK, SMALLEST_BLOCK, Bits

_EMBEDDING = "model.embed_tokens.weight"  # rows of it are looked up, for which there are no zero points and no order


def kept_forms(checkpoint: Checkpoint, widths: Mapping[str, Width], dtype: torch.dtype) -> dict[str, Form]:
    """The forms of those weights that can be kept, in a graph of `dtype`; each is read once, and let go.

    `widths` are what they would have otherwise: float8 is kept where it would be that, integers where they would be integers in blocks,
    and nothing where it would be seven bits or float4.
    """
    forms = dict[str, Form]()
    for name, width in widths.items():
        rounding = kept(checkpoint, name, dtype, float8=width == "float8") if width not in (7, "float4") else None
        if rounding is not None:
            narrow = dtype == torch.float32 and not is_by_output(width) and _held(rounding.scales, torch.float16)
            forms[name] = replace(rounding.form, narrow=narrow)
    return forms


def kept(
    checkpoint: Checkpoint,
    name: str,
    scales: torch.dtype,
    offsets: torch.dtype | None = None,
    float8: bool | None = None,
) -> Rounded | None:
    """A weight in the bits that the checkpoint has it in; None where it has none, or no form of ours holds them exactly.

    `scales` is the dtype that a graph has scales in, and offsets, unless it has them in `offsets`. `float8` says whether it is to be
    that; None: either.
    """
    part = checkpoint.quantized(name)
    if part is None or float8 not in (None, part.values.dtype == torch.float8_e4m3fn):
        return None
    weight = checkpoint.read(name)
    for rounding in _candidates(part):
        looked_up = rounding.zeros is None and rounding.order is None
        if not _held(rounding.scales, scales):
            continue
        if rounding.offsets is not None and not _held(rounding.offsets, offsets or scales):
            continue
        if (looked_up or name != _EMBEDDING) and holds(rounding, weight):
            return rounding
    return None


def why_again(checkpoint: Checkpoint, name: str, width: Width, dtype: torch.dtype) -> str:
    """Why a weight that a checkpoint has in few bits is not kept in a graph of `dtype` where it would have this width; it is read."""
    if "adapter" in checkpoint.titles and checkpoint.quantized(name) is None:
        return "an adapter is merged into it"
    if dtype != torch.float32 and kept_forms(checkpoint, {name: width}, torch.float32):
        return f"{str(dtype).removeprefix('torch.')} does not hold its scales, --dtype float32 does"
    rounding = kept(checkpoint, name, dtype)
    if rounding is None:
        return "no form here holds it"
    return f"only --weights {'fp8 keeps' if rounding.bits == 'float8' else 'int4, int8 and mixed keep'} it"


def _held(x: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(x.to(dtype).float(), x)


def _candidates(part: QuantizedTensor) -> list[Rounded]:
    """The forms that may hold it, the fastest first."""
    rows, columns = part.values.shape[-2:]
    if part.values.dtype == torch.float8_e4m3fn and part.values.ndim == 2 and part.scales.shape[-1] == 1:
        own = torch.arange(rows) // part.block[0] if len(part.scales) > 1 else torch.zeros(rows, dtype=torch.long)
        return [Rounded("float8", part.values, part.scales.float()[own])]
    divisor = math.gcd(part.block[1], columns)
    block = min(divisor & -divisor, LARGEST_BLOCK)  # the largest power of two in it
    integers = part.values.dtype in (torch.int8, torch.uint8)
    if part.values.ndim != 2 or not integers or block < SMALLEST_BLOCK:
        return []
    order = part.groups.sort(stable=True).indices if part.groups is not None else None
    if part.groups is not None and not torch.equal(part.groups[order], torch.arange(columns) // part.block[1]):
        return []  # groups of other sizes than they should have
    column = torch.arange(0, columns, block) // part.block[1]
    row = torch.arange(rows) // part.block[0]

    def spread(x: Tensor) -> Tensor:
        return x[row][:, column].contiguous()  # [N, G]

    bits: Bits = 4 if part.bits <= 4 else 8
    scales, middle = spread(part.scales.float()), 0 if part.values.dtype == torch.int8 else 1 << (part.bits - 1)
    values = (part.values.to(torch.int16) - middle).to(torch.int8)
    values = values if order is None else values[:, order]
    points = part.zeros.to(torch.int16) if part.zeros is not None else torch.zeros(part.scales.shape, dtype=torch.int16)
    zeros = spread(points - middle).to(torch.int8)
    if part.offsets is None:
        return [Rounded(bits, values, scales, zeros if zeros.any() else None, order=order)]
    offsets = spread(part.offsets.float())
    without = (offsets.double() - zeros * scales.double()).float()  # exact, but where exponents are far apart
    return [Rounded(bits, values, scales, None, without), Rounded(bits, values, scales, zeros, offsets)]
