"""What can be exported is to the rest of headfold: facts, a module to trace, tensors read one at a time, an oracle, tokenizer files.

Two makers of it: `own.py` for families with a table, `transformers_model.py` for whatever transformers loads. Behind them nobody
asks which.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.facts import Facts
from headfold.export.exportables.oracle import Oracle
from headfold.plugins.dtypes import Quantized
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import Road


class Tensors(Protocol):
    """The weights of a model, opened; they go when nothing holds it any more."""

    @property
    def path(self) -> Path:
        """Where they lie, for messages."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


class Changed(Tensors, Protocol):
    """A model's weights, some of which are others than its own."""

    @property
    def changed(self) -> Collection[str]:
        """The names of those."""
        ...


class Master(nn.Module):
    """What is traced: an nn.Module whose `decoder` has the tensors, by their names. It runs, too, once it has numbers.

    `forward(input_ids [B, S], attention_mask [B, T], caches)` gives logits [B, 1 or S, V], the caches with the new tokens in them, and
    the residual stream after each layer [B, S, hidden]. T - S columns of the mask are past; padding may be on either side.
    With `hidden_states` set, the last of these is followed by what the head is given of all tokens, in their order.
    """

    decoder: nn.Module
    layers: Sequence[nn.Module]  # of the decoder, in order
    others: Sequence[nn.Module] = ()  # embedding and head, where their weights are read only by calling them
    all_logits: bool
    hidden_states = False
    headless = False  # whether nobody knows which module makes the logits; then there are no `hidden_states`


def first_names(module: nn.Module) -> dict[str, str]:
    """Of every parameter the first of the names that it has, under which its tensor is known."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in module.named_parameters(remove_duplicate=False)}


def no_quantized_cache(path: Path) -> ConfigError:
    """What to raise of a model that cannot have one."""
    return ConfigError(
        "a quantized cache is made only for families that headfold has a table of",
        where=path,
        fix="Leave --kv-cache out.",
    )


class Exportable(Protocol):
    """See module."""

    @property
    def path(self) -> Path:
        """Where it came from, for messages and the bundle's manifest."""
        ...

    @property
    def road(self) -> Road:
        """Who made it."""
        ...

    @property
    def facts(self) -> Facts:
        """Sizes and how each layer attends."""
        ...

    @property
    def tokenizer(self) -> TokenizerFiles:
        """The files to pass on."""
        ...

    @property
    def titles(self) -> Mapping[str, str]:
        """What a person is told of how its weights lie there: their quantization, its adapter; where it has them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the model is, as plain JSON types: a manifest's `config`; equal for equal models."""
        ...

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """The module to trace, on meta tensors, weights in `dtype`; `capacity` in positions, where it has tables of them.

        `cache` is the dtype of a quantized cache.

        Raises:
            ConfigError: it cannot have that cache.
        """
        ...

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """Open the weights, for a bundle of `dtype`. They may be wider."""
        ...

    def tables(self, dtype: torch.dtype, capacity: int) -> Mapping[str, Tensor]:
        """What the master has beside its weights, computed from the configuration, in the dtype it has there."""
        ...

    def oracle(self, stored: torch.dtype, capacity: int, weights: Changed | None = None) -> Oracle:
        """Who says what is right, in float32 arithmetic with weights rounded to `stored`: as independent of us as there is one.

        `weights` are those to compute with in place of its own; what is changed in them is not rounded to `stored`.
        """
        ...

    def reference(
        self, stored: torch.dtype, capacity: int, arithmetic: torch.dtype, weights: Changed | None = None
    ) -> Oracle:
        """The same model computing in `arithmetic` throughout: how exact PyTorch is on it, which is no word on what is right."""
        ...
