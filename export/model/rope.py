"""Rotary tables: the cosines and sines that the attention op takes, for every RoPE scaling headfold knows.

Computed in float32, as the models were trained: at long positions float64 would differ from them by more than our tolerance.
"""

import math

import torch
from torch import Tensor

from headfold.export.model.config import ModelConfig


def rope_tables(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions` positions: two float32 tensors [positions, R/2], R the rotated dimensions.

    The attention factor of YaRN is multiplied in. Sources: Su et al. 2021 section 3.4.2; linear, Chen et al. 2023
    (arXiv 2306.15595) section 3.1; llama3, the Llama 3.1 reference code; YaRN, Peng et al. 2023 (arXiv 2309.00071)
    section 3.
    """
    rope = config.rope
    frequencies = 1.0 / rope.rope_theta ** (torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim)  # [R/2]
    factor = 1.0
    match rope.rope_type:
        case "linear":
            frequencies = frequencies / rope.factor
        case "llama3":
            frequencies = _llama3(config, frequencies)
        case "yarn":
            frequencies, factor = _yarn(config, frequencies)
    angles = torch.arange(positions).float()[:, None] * frequencies[None]  # [positions, R/2]
    return angles.cos() * factor, angles.sin() * factor


def _llama3(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    rope = config.rope
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    share = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - share) * frequencies / rope.factor + share * frequencies
    scaled = torch.where(wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, between)
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, scaled)


def _yarn(config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """NTK-by-parts: a ramp over the dimensions from extrapolation to interpolation, and the factor on cos and sin."""
    rope, dim = config.rope, config.rotary_dim

    def boundary(rotations: float) -> float:  # the dimension that turns so often over the original context
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = boundary(rope.beta_fast), boundary(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)  # [R/2], 0: extrapolate, 1: interpolate
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        factor = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = _mscale(rope.factor, 1.0)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp), factor


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
