"""The residual streams that enter each layer on calibration tokens: in the original model, and in the one whose earlier layers are
converted. One layer at a time, so that only its inputs are in memory.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from headfold.export.model.decoder import Attention, Decoder, Layer, sequence_layout

_TOGETHER = 2048  # tokens that go through a layer at a time


class Streams:
    """What enters layer `index`, for int64 tokens [N, S] without padding; `advance` goes on to the next."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        self.decoder, self.index = decoder, 0
        self.original = self.converted = decoder.model.embed_tokens(tokens)  # [N, S, hidden] each
        self.rope = (decoder.cos_cache.to(self.original.dtype), decoder.sin_cache.to(self.original.dtype))

    @property
    def layer(self) -> Layer:
        """The original model's layer."""
        return cast(Layer, self.decoder.model.layers[self.index])

    @property
    def attention(self) -> Attention:
        """The original model's attention."""
        return self.layer.self_attn

    def attend(self, attention: Attention, rows: Tensor) -> Tensor:
        """What `attention` makes of streams [n, S, hidden] in this layer's place, the same shape."""
        ones = torch.ones(rows.shape[:2], dtype=torch.long)
        output: Tensor = attention(self.layer.input_layernorm(rows), sequence_layout(ones, ones), self.rope, None)[0]
        return output

    @torch.inference_mode()
    def error(self, converted: Attention) -> float:
        """Relative squared error of a converted attention's output on the original inputs, |new - old|^2 / |old|^2."""
        wrong, whole = 0.0, 0.0
        for rows in blocks(self.original):
            old, new = (self.attend(a, rows).double() for a in (self.attention, converted))
            wrong, whole = wrong + (new - old).square().sum().item(), whole + old.square().sum().item()
        return wrong / whole if whole else 0.0

    @torch.inference_mode()
    def advance(self, converted: Attention | None = None) -> None:
        """Put both streams through the layer, the second with its converted attention; without, the layer counts as unchanged."""
        self.original, self.converted = (
            self._through(self.attention, self.original),
            self._through(converted or self.attention, self.converted),
        )
        self.index += 1

    def _through(self, attention: Attention, hidden: Tensor) -> Tensor:
        parts = []
        for rows in blocks(hidden):
            x = rows + self.attend(attention, rows)
            parts.append(x + self.layer.mlp(self.layer.post_attention_layernorm(x)))
        return torch.cat(parts)


def blocks(hidden: Tensor) -> Iterator[Tensor]:
    """The streams [N, S, hidden], as many sequences at a time as go through a layer together."""
    return iter(torch.split(hidden, max(_TOGETHER // hidden.shape[1], 1)))
