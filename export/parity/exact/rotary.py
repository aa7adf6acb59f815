"""Rotary tables by the papers' formulas, in float64 and in numpy: our own second opinion on `headfold.export.model.rope`."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headfold.export.model.config import RopeConfig

Array = NDArray[np.float64]
_BLOCK = 4096  # positions at a time
_EPS = 2.0**-24  # half of float32's spacing at 1


def frequencies(rope: RopeConfig, dim: int) -> tuple[Array, float]:
    """Radians per position of each rotated pair [dim/2], and the factor on cosines and sines.

    Su et al. 2021 section 3.4.2; linear, Chen et al. 2023 (arXiv 2306.15595) section 3.1; llama3, the Llama 3.1 reference code;
    yarn, Peng et al. 2023 (arXiv 2309.00071) sections 3.2 to 3.4.
    """
    plain = rope.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaled, original = plain / rope.factor, rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return scaled, 1.0
    if rope.rope_type == "llama3":
        turns = original * plain / (2 * math.pi)  # over the original context
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        return kept * plain + (1 - kept) * scaled, 1.0
    if rope.rope_type == "yarn":
        low, high = (
            dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        return ramp * scaled + (1 - ramp) * plain, _yarn_factor(rope)
    return plain, 1.0


def _yarn_factor(rope: RopeConfig) -> float:
    def magnitude(scale: float) -> float:  # section 3.4: 0.1 ln(s) + 1
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def tables(rope: RopeConfig, dim: int, positions: int) -> Iterator[tuple[int, Array, Array, Array]]:
    """Blocks of (first position, cosines, sines, how far a table computed in float32 may be off), [N, dim/2] each.

    Models compute angles in float32: a frequency is off by a few units in the last place, and more for the rounding of its exponent,
    which the logarithm of theta multiplies; the angle by as much, times the position. Theta x 1.001 moves the angle a thousand
    times as far as that.
    """
    turning, factor = frequencies(rope, dim)
    exponents = np.arange(0, dim, 2) / dim
    unsure = turning * _EPS * (8 + 2 * exponents * abs(math.log(rope.rope_theta)))  # radians per position
    for begin in range(0, positions, _BLOCK):
        position = np.arange(begin, min(begin + _BLOCK, positions), dtype=np.float64)[:, None]
        angles = position * turning
        cos, sin = factor * np.cos(angles), factor * np.sin(angles)
        yield begin, cos, sin, factor * (position * unsure + 4 * _EPS)
