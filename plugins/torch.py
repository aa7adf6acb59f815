"""Attention for a module of your own, called as scaled_dot_product_attention is: it trains as it stands, and headfold exports it.

`from headfold.plugins.torch import attention`; what the module's `forward` has to look like: `headfold.export.export_module`.
"""

from typing import Protocol

import torch
from torch import Tensor

from headfold.plugins.attention.schema import AttentionInputs, Attributes
from headfold.plugins.attention.torch_op import attend


class Cache(Protocol):
    """What a module's `forward` is given, to hand on to `attention`: the keys and values of the tokens before."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, sinks: Tensor | None
    ) -> Tensor:
        """See `attention`."""
        ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache | None = None,
    layer: int = 0,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend causally over the new tokens, and over those before them that are in the cache.

    Args:
        query: [B, Hq, S, D], rotated, if the model rotates.
        key: [B, Hkv, S, D], likewise; Hq is a multiple of Hkv.
        value: [B, Hkv, S, D].
        cache: what `forward` was given. Without one, as in training, the new tokens are all there is.
        layer: whose keys and values these are, from 0.
        scale: of the scores; by default 1 / sqrt(D).
        window: a token sees itself and the window - 1 tokens before it; None: all of them.
        softcap: scores become softcap * tanh(scores / softcap); 0: off.
        sinks: [Hq], a logit per query head that only the softmax sees.

    Returns:
        [B, Hq, S, D].

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit each other.
    """
    _check(query, key, value, window, sinks)
    batch, heads, length, head_dim = query.shape
    attributes = Attributes(
        num_heads=heads,
        kv_num_heads=key.shape[1],
        scale=head_dim**-0.5 if scale is None else float(scale),
        local_window_size=-1 if window is None else window,
        softcap=float(softcap),
    )
    if cache is not None:
        return cache.attend(layer, query, key, value, attributes, sinks)
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))  # [B, S, H*D]
    inputs = AttentionInputs(
        query=q,
        key=k,
        value=v,
        past_key=None,
        past_value=None,
        past_lengths=torch.zeros(batch, dtype=torch.long, device=q.device),
        total_sequence_length=length,
        head_sink=sinks,
    )
    return attend(inputs, attributes).view(batch, length, heads, head_dim).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> None:
    shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"attention takes queries, keys and values [batch, heads, tokens, size], not {shapes}")
    if key.shape[3] != query.shape[3] or value.shape[3] != query.shape[3]:
        raise ValueError(f"attention takes queries, keys and values of one head size, not {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
        raise ValueError(f"attention takes a key and a value per token, each for as many query heads, not {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention takes one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"a token sees itself, at least: the window is {window}")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"attention takes a sink for each of {query.shape[1]} query heads, not {list(sinks.shape)}")
