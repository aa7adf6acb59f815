"""transformers' attention becomes our op: an attention function registered by name, and a cache that hands the new keys on to it.

Any decoder of transformers that asks `AttentionInterface` for its attention then traces into the op, with its caches updated in place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from headfold.export.exportables.facts import LayerFacts
from headfold.export.exportables.foreign.traced import OnePass
from headfold.export.exportables.transformers_road import masks
from headfold.export.exportables.transformers_road.masks import CAUSAL, Visible
from headfold.plugins.attention.schema import Attributes
from headfold.runtime.errors import ConfigError

NAME = "headfold"  # of the attention, in `config._attn_implementation`
_OTHER = "headfold exports decoders whose every layer attends causally, to keys and values of its own."
_current: ContextVar["OpCache"] = ContextVar("the cache of the forward pass that is running")


class OpCache(Cache):  # type: ignore[misc]
    """The caches of one forward pass. `update` stores nothing: it hands the new keys and values on, and remembers whose they are.

    What each layer sees is `known`, but for the pass that learns it.
    """

    def __init__(self, num_hidden_layers: int, one_pass: OnePass, known: Sequence[LayerFacts] = ()) -> None:
        super().__init__(layers=[])
        self._count, self._pass, self._known = num_hidden_layers, one_pass, known
        self._handed: tuple[int, Tensor, Tensor] | None = None  # a layer, and the keys and values that it last gave

    @contextmanager
    def running(self) -> Iterator[None]:
        """Attention inside the block is this cache's."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values themselves."""
        self._handed = layer_idx, key_states, value_states
        return key_states, value_states

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Convolutions and recurrences ask, and cannot have one."""
        raise ConfigError("has a state beside keys and values", fix=_OTHER)

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = has_previous_state

    def attend(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, sinks: Tensor | None
    ) -> Tensor:
        """[B, Hq, S, D] of new queries [B, Hq, S, D], keys and values [B, Hkv, S, D]."""
        handed, self._handed = self._handed, None
        if handed is None or handed[0] in self._pass.facts:
            raise ConfigError("attends to the keys of another layer", where=name, fix=_OTHER)
        layer, keys, values = handed
        if keys is not key or values is not value:
            what = "attends to other keys and values than it caches (multi-head latent attention?)"
            raise ConfigError(what, where=name, fix=_OTHER)
        if self._known:
            attributes = replace(attributes, local_window_size=self._known[layer].window)
        return self._pass.attend(layer, query, key, value, attributes, sinks)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As without a past; the op has a mask of its own."""
        return query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """No: it is for one pass."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets anything."""
        return [False] * self._count

    is_linear = is_dummy = is_sliding  # nor is one anything else

    def __len__(self) -> int:
        return self._count


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visible | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """See transformers' AttentionInterface; `s_aux` are sinks [Hq]. Queries [B, Hq, S, D], keys and values [B, Hkv, S, D]."""
    name = type(module).__name__
    if value.shape[-1] != query.shape[-1]:
        raise ConfigError(
            f"has values of size {value.shape[-1]} and keys of size {query.shape[-1]} (multi-head latent attention?)",
            where=name,
            fix="headfold's attention op wants them equal.",
        )
    if isinstance(attention_mask, Tensor):
        raise ConfigError("brings an attention mask of its own", where=name, fix=_OTHER)
    learning = not torch.compiler.is_exporting()
    if (learning and attention_mask is None) or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ConfigError("attends in both directions", where=name, fix="headfold exports decoders.")
    window = attention_mask.window if attention_mask is not None else -1
    if window is None or window == 0:
        raise ConfigError("has tokens see in a pattern of its own (in chunks or blocks?)", where=name, fix=CAUSAL)
    attributes = Attributes(
        num_heads=query.shape[1],
        kv_num_heads=key.shape[1],
        scale=float(scaling) if scaling is not None else query.shape[3] ** -0.5,
        local_window_size=window,
        softcap=float(softcap or 0),
    )
    cache = _current.get(None)
    if cache is None:
        raise RuntimeError(f"{name} attends outside of an OpCache")
    return cache.attend(name, query, key, value, attributes, s_aux).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
masks.register(NAME)
