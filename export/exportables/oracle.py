"""Who says what a model computes: logits, residual streams, keys and values of one sequence, after a given past.

An oracle sees one sequence at a time and no padding, so it knows nothing of batches, masks or chunks. Our own decoder is one;
transformers' model is in `transformers_oracle.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headfold.export.model.decoder import Decoder, Scales
from headfold.plugins.dtypes import Quantized

_AT_ONCE = 1 << 20  # weights that are nudged together
Array = NDArray[Any]  # float32, or float64 of an oracle that computes in it
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class QuantizedCache:
    """Keys and values are kept in `dtype`, divided by the scales of their layer's heads."""

    dtype: Quantized
    scales: Sequence[Scales]


@dataclass(frozen=True)
class Past:
    """What the cache of each layer stores of the tokens before: keys, rotated, and values, [Hkv, P, D] each, as floats."""

    layers: Sequence[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        """P."""
        return int(self.layers[0][0].shape[1])


@dataclass(frozen=True)
class Answer:
    """What an oracle says of S new tokens."""

    logits: Array  # [S, V]
    hidden_states: list[Array]  # the residual stream after each layer, [S, hidden]
    cache: list[tuple[Array, Array]]  # what each layer's cache stores of them, [Hkv, S, D]
    normed: Array | None = None  # what the head is given, [S, hidden]; None of a model without a head of its own

    @staticmethod
    def of(
        logits: Tensor,
        hidden_states: Iterable[Tensor],
        cache: Iterable[tuple[Tensor, Tensor]],
        normed: Tensor | None,
    ) -> "Answer":
        """The same as tensors, which become arrays of float32, or float64 as they are; those of a cache keep nothing else of it."""
        pairs = [(as_array(keys.clone()), as_array(values.clone())) for keys, values in cache]
        streams = [as_array(x) for x in hidden_states]
        return Answer(as_array(logits), streams, pairs, None if normed is None else as_array(normed))


class Oracle(Protocol):
    """A model, computing in one dtype."""

    @property
    def name(self) -> str:
        """What it is, for the report."""
        ...

    @property
    def module(self) -> nn.Module:
        """What computes, with the weights; its own, to do with as one likes."""
        ...

    def answer(
        self,
        tokens: Tokens,
        past: Past | None = None,
        given: Sequence[Array] | None = None,
        cache: QuantizedCache | None = None,
    ) -> Answer:
        """Compute.

        Args:
            tokens: [S].
            past: of the tokens before these; None for none.
            given: what each layer hands on, [S, hidden], in place of what it computes: so each layer is judged on inputs it was given.
            cache: how the cache stores; None for as it is.
        """
        ...


class DecoderOracle:
    """Our own decoder; see `Oracle`. Its dtype is the one that is computed in."""

    name = "headfold's own decoder in PyTorch"

    def __init__(self, decoder: Decoder) -> None:
        self.module = decoder

    @torch.inference_mode()
    def answer(
        self,
        tokens: Tokens,
        past: Past | None = None,
        given: Sequence[Array] | None = None,
        cache: QuantizedCache | None = None,
    ) -> Answer:
        """See Oracle."""
        decoder, start = self.module, 0 if past is None else past.length
        if cache is not None:
            decoder.quantize_cache(getattr(torch, cache.dtype), cache.scales)
        else:
            decoder.keep_cache()
        mask = torch.ones(1, start + len(tokens), dtype=torch.long)
        with handed_on(decoder.model.layers, given) as heard, _behind(decoder, past, len(tokens)) as new:
            output = decoder(torch.from_numpy(tokens)[None], mask, normed=True)
        return Answer.of(output.logits[0], heard, new, output.normed[0])


@contextmanager
def _behind(decoder: Decoder, past: Past | None, count: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the block each layer has a past behind `count` new tokens, in a cache that is then the next one's; those of the new ones.

    All layers' caches together would be larger than many a model.
    """
    start, new = 0 if past is None else past.length, list[tuple[Tensor, Tensor]]()
    cache = decoder.new_layer_cache(1, start + count)

    def come(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for all_tokens, old in zip(cache, past.layers[len(new)] if past is not None else (), strict=past is not None):
            all_tokens[0, :, :start] = old.to(all_tokens.dtype)
        return (*inputs[:-1], cache)

    def go(_layer: nn.Module, _inputs: Any, output: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, None]:
        keys, values = (all_tokens[0, :, start:].clone() for all_tokens in output[1])
        new.append((keys, values))
        return output[0], None

    handles = [layer.register_forward_pre_hook(come) for layer in decoder.model.layers]
    handles += [layer.register_forward_hook(go) for layer in decoder.model.layers]
    try:
        yield new
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def handed_on(layers: Iterable[nn.Module], given: Sequence[Array] | None) -> Iterator[list[Tensor]]:
    """What each layer computes inside the block, [S, hidden], for one sequence; `given` is what goes on to the next one instead.

    A layer's output is the residual stream [1, S, hidden], alone or first in a tuple.
    """
    heard: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        heard.append(x[0])
        if given is None:
            return output
        x = torch.from_numpy(given[len(heard) - 1]).to(x.dtype)[None]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def given_to(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a model's head is given inside the block, [S, hidden], for one sequence."""
    heard: list[Tensor] = []
    if head is None:
        yield heard
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0][0]))
    try:
        yield heard
    finally:
        handle.remove()


def as_array(x: Tensor) -> Array:
    """In float32, or float64 as it is."""
    return (x if x.dtype == torch.float64 else x.float()).numpy()


def nudge(module: nn.Module, seed: int, told_by: torch.dtype = torch.float32) -> None:
    """Change each weight by less than a dtype can tell: by a random part of its eps, of the weight itself, up or down.

    In place, and only those in float64, which `widened` copied: a large model's layers have none but while they compute, and stay.
    """
    random = torch.Generator().manual_seed(seed)
    eps = torch.finfo(told_by).eps
    for parameter in module.parameters():
        if parameter.dtype == torch.float64:
            parameter.data = parameter.data.contiguous()
            for part in torch.split(parameter.data.view(-1), _AT_ONCE):
                change = torch.rand(part.shape, generator=random, dtype=part.dtype)
                part *= change.mul_(2).sub_(1).mul_(eps).add_(1)
