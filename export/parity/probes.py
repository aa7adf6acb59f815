"""What is asked of oracle and graph: rows of tokens, the steps in which a graph with a cache is fed them, and pasts to start from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headfold.export.exportables.oracle import Past, Tokens
from headfold.plugins.dtypes import QUANTIZED, Quantized

Feed = dict[str, NDArray[np.generic]]
CHUNK = 512  # tokens that the runtime prefills at once
_LONG = 1 << 28  # bytes: a batch of ragged rows whose caches take more in each layer is cut


@dataclass(frozen=True)
class Step:
    """One call of the graph: the check it belongs to, its inputs, and which of its rows' tokens are new, [start, end) each."""

    check: str
    feed: Feed  # input_ids [B, S] and attention_mask [B, T]; T = S starts new sequences
    rows: tuple[int, ...]  # their numbers
    spans: tuple[tuple[int, int], ...]


def make_prompts(vocab_size: int, length: int, text: Sequence[int] | None) -> list[Tokens]:
    """Three prompts of different lengths: real text, where there is a tokenizer, and random tokens, the same every time."""
    random = np.random.default_rng(0).integers(0, vocab_size, (3, length))
    first = np.array(text[:length]) if text else random[0]
    return [first, random[1][: max(1, length // 3)], random[2][: max(1, 2 * length // 3)]]


def make_rows(prompts: Sequence[Tokens], decode_steps: int, vocab_size: int) -> list[Tokens]:
    """Each prompt, and the random tokens that follow it: as many as are decoded after the first, at most two after the others."""
    forced = np.random.default_rng(1).integers(0, vocab_size, (len(prompts), decode_steps))
    return [
        np.concatenate([prompt, forced[row, : decode_steps if row == 0 else 2]]) for row, prompt in enumerate(prompts)
    ]


def feed(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Feed:
    """The inputs of one iteration."""
    return {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": np.ascontiguousarray(mask, np.int64)}


def make_steps(rows: Sequence[Tokens], prompts: Sequence[Tokens]) -> Iterator[Step]:
    """Prefill, decoding token by token, prefill in uneven chunks, and all rows as one ragged batch with padding on either side."""
    first, prompt = rows[0][None], len(prompts[0])  # [1, N]

    def alone(check: str, begin: int, end: int) -> Step:
        return Step(check, feed(first[:, begin:end], np.ones((1, end), np.int64)), (0,), ((begin, end),))

    yield alone("prefill", 0, prompt)
    for i in range(prompt, len(rows[0])):
        yield alone("decode", i, i + 1)
    third = prompt // 3
    for begin, end in ((0, third), (third, third + 1), (third + 1, prompt)):  # uneven on purpose, one of a single token
        if end > begin:
            yield alone("chunked prefill", begin, end)
    everyone, lengths = tuple(range(len(rows))), [len(prompt) for prompt in prompts]
    for side in ("right", "left"):
        ids, mask = pad(prompts, side)
        name = f"ragged batch, {side} padding"
        yield Step(name, feed(ids, mask), everyone, tuple((0, n) for n in lengths))
        for i in range(min(len(row) - n for row, n in zip(rows, lengths, strict=True))):
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
            ids = np.array([row[n + i : n + i + 1] for row, n in zip(rows, lengths, strict=True)])
            yield Step(name, feed(ids, mask), everyone, tuple((n + i, n + i + 1) for n in lengths))


def pad(prompts: Sequence[Tokens], side: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [B, longest], padded with token 0 on one side."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@dataclass(frozen=True)
class Place:
    """Where in a sequence layers are judged alone: S new tokens behind a past of P, or several rows with a token each."""

    check: str
    pasts: tuple[int, ...]  # P of each row
    tokens: Tokens  # [B, S]


def make_places(windows: Iterable[int], capacity: int, vocab_size: int, row_bytes: int) -> list[Place]:
    """Around every window's edge, across the chunks of a prefill, at the capacity's end; and all of those as rows of one batch.

    `row_bytes` are those of one position in the largest layer's cache: what the ragged batch may take is bounded.
    """
    random = np.random.default_rng(2)
    edges = [("at a window's edge", window - 2) for window in sorted(set(windows))]
    edges += [("across the chunks of a prefill", CHUNK - 1), ("at the end of the capacity", capacity - 3)]
    edges = [(name, max(past, 1)) for name, past in edges]
    places = [
        Place(name, (past,), random.integers(0, vocab_size, (1, 3))) for name, past in edges if past + 3 <= capacity
    ]
    pasts = sorted({1, *(past + 1 for _, past in edges if past + 2 <= capacity), capacity - 1} - {0})
    while len(pasts) > 1 and len(pasts) * pasts[-1] * row_bytes > _LONG:
        pasts.pop()
    if capacity > 1:
        places.append(Place("rows of unequal length", tuple(pasts), random.integers(0, vocab_size, (len(pasts), 1))))
    return places


class Pasts:
    """Random keys and values that sequences may have behind them, [Hkv, C, D] of each layer: equal for layers of equal shape.

    A past of P tokens is the first P; what lies behind it in a cache are the others, which nobody may see. Values at the edges are
    large, so that a token too many or too few shows among thousands.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        places: Sequence[Place],
        windows: Iterable[int],
        cache: Quantized | None,
    ) -> None:
        self._shapes, self._cache = shapes, cache  # (Hkv, D) of each layer
        self.capacity = max((max(place.pasts) + place.tokens.shape[1] for place in places), default=1)
        edges = {0}
        for place in places:
            for past in place.pasts:
                for position in range(past, past + place.tokens.shape[1]):
                    edges |= {position - 1, position, position + 1}
                    edges |= {position - window + by for window in windows for by in (-1, 0, 1)}
        self._edges = sorted(edge for edge in edges if 0 <= edge < self.capacity)
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as floats, [Hkv, capacity, D]."""
        heads, size = shape = self._shapes[index]
        if shape not in self._made:
            generator = torch.Generator().manual_seed(3)
            keys, values = (torch.randn(heads, self.capacity, size, generator=generator) for _ in range(2))
            values[:, self._edges] *= 64
            self._made[shape] = self._stored(keys), self._stored(values)
        return self._made[shape]

    def before(self, length: int) -> Past:
        """The first tokens, as an oracle takes them."""
        return Past(
            [(keys[:, :length], values[:, :length]) for keys, values in map(self.layer, range(len(self._shapes)))]
        )

    def _stored(self, x: Tensor) -> Tensor:
        """As a quantized cache would have it: the same numbers, as floats."""
        if self._cache is None:
            return x
        _, largest = QUANTIZED[self._cache]
        scaled = (x * largest / 4).clamp(-largest, largest)
        return (scaled.round() if self._cache == "int8" else scaled).to(getattr(torch, self._cache)).float()
