"""Scales of a quantized KV cache, so that what it holds of real text fills the range of its dtype; and what quantization costs.

Each layer's key/value heads have a scale each for keys and for values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headfold.export.model.decoder import Decoder, Scales
from headfold.plugins.attention.torch_op import stored_range
from headfold.runtime.errors import ConfigError

_SMALLEST = 1e-8  # of a scale: a head that is always zero stays zero


@dataclass(frozen=True)
class QuantizationCost:
    """The decoder with a quantized cache against itself without, on the calibration tokens."""

    kl: float  # mean of KL(without || with) of the next token's distribution, nats
    top1: float  # share of positions whose likeliest token is the same


@torch.inference_mode()
def cache_scales(decoder: Decoder, tokens: Tensor, dtype: torch.dtype) -> list[Scales]:
    """Per layer and head the largest magnitude of keys (after RoPE) and values, over the largest number of `dtype`.

    Args:
        decoder: with a cache that is not quantized.
        tokens: int64 [N, S] to calibrate on.
        dtype: int8 or float8_e4m3fn.

    Raises:
        ConfigError: the keys or values hold NaN or infinity.
    """
    _, largest = stored_range(dtype)
    seen = []
    for row in tokens:
        cache = decoder.new_cache(1, len(row))
        decoder(row[None], None, cache, last_only=True)
        magnitudes = [x.float().abs().amax((0, 2, 3)) for pair in cache for x in pair]  # [Hkv] each
        seen.append(torch.stack(magnitudes))  # [2 L, Hkv]
    scales = (torch.stack(seen).amax(0) / largest).clamp(min=_SMALLEST)
    if not scales.isfinite().all():
        raise ConfigError(
            "the model's keys or values hold NaN or infinity, which no scale fits",
            fix="Leave out --kv-cache, or correct the weights.",
        )
    return list(zip(scales[::2], scales[1::2], strict=True))


@torch.inference_mode()
def quantization_cost(decoder: Decoder, tokens: Tensor, dtype: torch.dtype, scales: list[Scales]) -> QuantizationCost:
    """Measure it; the decoder's cache is quantized afterwards."""
    before = [decoder(row[None]).logits[0].float().log_softmax(-1) for row in tokens]  # [S, V] each
    decoder.quantize_cache(dtype, scales)
    kl, same = [], []
    for row, exact in zip(tokens, before, strict=True):
        rounded = decoder(row[None]).logits[0].float().log_softmax(-1)
        kl.append((exact.exp() * (exact - rounded)).sum(-1))
        same.append((exact.argmax(-1) == rounded.argmax(-1)).float())
    return QuantizationCost(float(torch.cat(kl).mean()), float(torch.cat(same).mean()))
