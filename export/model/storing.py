"""How a graph stores a rounded weight: the names, shapes and packing of its numbers, scales, and what else its form has."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.export.model.rounding import Form, Rounded, Width
from headfold.plugins.quantized.schema import Bits

SCALES, ZEROS, OFFSETS = ".scales", ".zeros", ".offsets"  # what the names of parts end in
ORDER = "order."  # what the name of an order begins with: all weights of that order share it


def stored_bits(width: Width) -> Bits:
    """Of a number in a matrix of blocks, as a graph stores it."""
    return 4 if width == 4 else 8


def packed(values: Tensor, bits: Bits) -> Tensor:
    """Numbers [..., M] as `headfold.plugins.quantized.schema` has them: uint8 [..., M * bits / 8], rounded up."""
    positive = values.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    if bits == 8:
        return positive
    if positive.shape[-1] % 2:
        positive = F.pad(positive, (0, 1))
    return positive[..., ::2] | positive[..., 1::2] << 4


def unpacked(stored: Tensor, bits: Bits) -> Tensor:
    """The inverse of `packed`, of an even number of numbers."""
    positive = stored if bits == 8 else torch.stack((stored & 15, stored >> 4), -1)
    return (positive.flatten(1) - (1 << (bits - 1))).view(torch.int8)


def stored_shapes(name: str, form: Form, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The parts of the weight `name` among a graph's weights: numbers, scales, and what else the form has, in order.

    `shape` is the checkpoint's; what is stored is [N, K], or of experts [E, N, K]. Rows of eight bits come first.
    """
    if form.wide_rows:
        return {part: size for piece in form.pieces(shape) for part, size in stored_shapes(name, *piece).items()}
    *experts, rows, columns = (*shape[:-2], shape[-1], shape[-2]) if form.transposed else shape
    kind = form.bits if isinstance(form.bits, str) else f"int{form.bits}"
    base, blocks = f"{name}.{kind}", columns // form.block
    if form.by_output:
        return {base: (rows, columns), f"{base}{SCALES}": (rows,)}
    bits = stored_bits(form.bits)
    if experts:
        return {base: (*experts, rows, columns * bits // 8), f"{base}{SCALES}": (*experts, rows, blocks)}
    shapes: dict[str, tuple[int, ...]] = {
        base: (rows, blocks, form.block * bits // 8),
        f"{base}{SCALES}": (rows, blocks),
    }
    if form.zeros:
        shapes[f"{base}{ZEROS}"] = (rows, -(-blocks * bits // 8))
    if form.offsets:
        shapes[f"{base}{OFFSETS}"] = (rows, blocks)
    if form.order is not None:
        shapes[f"{ORDER}{form.order}"] = (columns,)
    return shapes


def whole_name(part: str) -> str:
    """The weight that the numbers `part` are of, see `stored_shapes`; of another tensor itself."""
    return re.sub(r"\.(int[478]|float[48])$", "", part)


def stored_part(rounding: Rounded, part: str) -> Tensor:
    """One of the parts that `stored_shapes` names."""
    if rounding.wide_rows:
        (rounding,) = (piece for piece in rounding.pieces() if part.removesuffix(SCALES).endswith(f".int{piece.bits}"))
    if rounding.bits == 7 or rounding.bits == "float8":
        return rounding.scales.flatten() if part.endswith(SCALES) else rounding.values
    if part.endswith(SCALES):
        return rounding.scales
    if part.startswith(ORDER):
        assert rounding.order is not None
        return rounding.order
    for end, numbers in ((ZEROS, rounding.zeros), (OFFSETS, rounding.offsets)):
        if part.endswith(end):
            assert numbers is not None
            return packed(numbers, stored_bits(rounding.bits)) if end == ZEROS else numbers
    numbers = packed(rounding.values, stored_bits(rounding.bits))
    return numbers.view(*rounding.scales.shape, -1) if numbers.dim() == 2 else numbers  # see the schemas
