"""Rounding of weights to four or eight bits, symmetric, in blocks along the input dimension.

A block is `BLOCK` weights that share a scale. The rule is GGUF's of the same width, so what such a file holds is kept: Q8_0 in eight
bits, Q4_0 in four, bit for bit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.manifest import WeightsScheme

Rounded = tuple[Tensor, Tensor]  # numbers, int8 [N, K], and scales, float32 [N, K / BLOCK]
# In eight bits always: four there cost most (issue 13, measured)
_WIDE = ("model.embed_tokens.weight", "lm_head.weight")


def bits_of(shapes: Mapping[str, tuple[int, ...]], scheme: WeightsScheme) -> dict[str, Bits]:
    """Which of a decoder's tensors are rounded, and to how many bits: its matrices, [out, in], that have whole blocks.

    Of "mixed" this is the least that they can have.
    """
    narrow: Bits = 8 if scheme == "int8" else 4
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] % BLOCK == 0]
    return {name: 8 if name in _WIDE else narrow for name in matrices}


def rounded(weight: Tensor, bits: Bits) -> Rounded:
    """The nearest numbers, and the scales of their blocks, of a weight [N, K].

    In eight bits the scale is the block's largest magnitude over 127; in four its extreme, with its sign, over -8, so that all 16
    numbers are used (both as in ggml's reference quantization). A block of zeros has scale 1.
    """
    blocks = weight.float().view(len(weight), -1, BLOCK)  # [N, K / BLOCK, BLOCK]
    scales = block_scales(blocks, bits)
    return nearest(blocks, scales[..., None], bits).to(torch.int8).flatten(1), scales


def block_scales(blocks: Tensor, bits: Bits) -> Tensor:
    """The scales [...] of blocks [..., BLOCK]; see `rounded`."""
    largest = blocks.abs().amax(-1) if bits == 8 else blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    scales = largest / (127 if bits == 8 else -8)
    return torch.where(scales == 0, 1.0, scales)


def nearest(weights: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The nearest numbers that `bits` have, in the dtype of the weights; scales broadcast."""
    half = 1 << (bits - 1)
    return (weights / scales).round().clamp(-half, half - 1)


def restored(values: Tensor, scales: Tensor) -> Tensor:
    """What numbers and scales stand for, float32 [N, K]."""
    return (values.view(len(values), -1, BLOCK) * scales[..., None]).flatten(1)


def packed(values: Tensor, bits: Bits) -> Tensor:
    """Numbers as `headfold.plugins.quantized.schema` has them: uint8 [N, K / BLOCK, BLOCK * bits / 8]."""
    positive = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).view(len(values), -1, BLOCK)
    return positive if bits == 8 else positive[..., ::2] | positive[..., 1::2] << 4


def unpacked(stored: Tensor, bits: Bits) -> Tensor:
    """The inverse of `packed`."""
    positive = stored if bits == 8 else torch.stack((stored & 15, stored >> 4), -1)
    return (positive.flatten(1).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def stored_names(name: str, bits: Bits) -> tuple[str, str]:
    """What the packed numbers and the scales of the weight `name` are called among a graph's weights."""
    return f"{name}.int{bits}", f"{name}.int{bits}.scales"
