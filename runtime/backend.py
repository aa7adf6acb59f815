"""What `generate` needs of an engine, and what every engine's session does alike. Needs numpy only: an engine's own file runs it.

Shapes: B rows of a batch's cache, b of them in a step, T tokens a row has with its new ones, V the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.errors import CapacityError
from headfold.runtime.scheduling.host_rows import HostRows

CHUNK = 512  # tokens per prefill step: enough to keep matrix products efficient, few enough to bound their memory


class Cache(Protocol):
    """The KV cache of one batch."""

    lengths: NDArray[np.int64]  # [B] tokens in each row
    capacity: int  # tokens a row can have
    token_bytes: int  # of one token in one row
    host: HostRows | None  # its memory, where that is this process's own


AnyCache = TypeVar("AnyCache", bound=Cache)


class Backend(Protocol[AnyCache]):
    """What `generate` needs of an engine. Every backend refuses with CapacityError what does not fit its cache."""

    @property
    def session(self) -> Any:
        """The engine's own object, for people who bring their own loop."""
        ...

    @property
    def gives_all_logits(self) -> bool:
        """Whether `prefill` has the logits of all its tokens in one step; otherwise they take a step each."""
        ...

    @property
    def gives_hidden_states(self) -> bool:
        """Whether `hidden_states` can be asked for."""
        ...

    def largest_cache(self, rows: int) -> tuple[int, int]:
        """Rows, at most so many, and tokens in each, of the largest cache that may be asked for."""
        ...

    def new_cache(self, batch: int, capacity: int) -> AnyCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        ...

    def prefill(
        self, cache: AnyCache, row: int, ids: NDArray[np.int64], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Append the tokens `ids` [S], S >= 1, to a row; logits [V] of the last, or [S, V] of all."""
        ...

    def hidden_states(self, cache: AnyCache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append the tokens as `prefill` does; what the head is given of each, [S, hidden]. Raises InputError where it cannot."""
        ...

    def decode(self, cache: AnyCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Append one token to each active row, `tokens` [B]; logits [B, V], valid until the next call.

        At least one row is active; the others keep what they have, and their logits are undefined.
        """
        ...


@dataclass(frozen=True)
class Window:
    """The rows that a decode step runs, from the first to the last active one: a contiguous part of the cache, so nothing moves."""

    rows: NDArray[np.intp]  # the active ones
    first: int
    end: int
    lengths: NDArray[np.int64]  # [b] tokens of all of them, the new one not counted

    @property
    def total(self) -> int:
        """Tokens the longest row has with its new one."""
        return int(self.lengths.max()) + 1

    def mask(self, width: int) -> NDArray[np.int64]:
        """The attention mask [b, width]: zeros, then each row's past and its new token.

        A row between two active ones runs along: its new key and value land behind its last, and count for nothing. Only one
        that is full, so can never go on, has them land on its last.
        """
        past = np.minimum(self.lengths, width - 1)
        return (np.arange(width) >= width - 1 - past[:, None]).astype(np.int64)


def decode_window(cache: Cache, active: NDArray[np.bool_]) -> Window:
    """The window of a decode step. Raises CapacityError: an active row is full."""
    rows = np.flatnonzero(active)
    check_room(cache, int(cache.lengths[rows].max()) + 1)
    first, end = int(rows[0]), int(rows[-1]) + 1
    return Window(rows, first, end, cache.lengths[first:end])


@dataclass(frozen=True)
class Chunk:
    """One step of a prefill: tokens `begin` to `end` of the new ones."""

    begin: int
    end: int
    ids: NDArray[np.int64]  # [1, s]
    mask: NDArray[np.int64]  # [1, T]


def prefill_chunks(cache: Cache, row: int, ids: NDArray[np.int64], size: int) -> Iterator[Chunk]:
    """The steps that append `ids` [S] to a row, about equal parts of at most `size`; after each of them, the row has its tokens.

    Equal and even, but for the last one, if `size` allows it: see `headfold.runtime.scheduling.slots.next_part`.

    Raises:
        CapacityError: the tokens do not fit the cache.
    """
    start = int(cache.lengths[row])
    check_room(cache, start + len(ids))
    unit = min(size, 2)
    units = -(-len(ids) // unit)
    count = -(-units // (size // unit))
    for number in range(count):
        begin, end = (min(units * edge // count * unit, len(ids)) for edge in (number, number + 1))
        yield Chunk(begin, end, np.ascontiguousarray(ids[None, begin:end]), np.ones((1, start + end), np.int64))
        cache.lengths[row] = start + end


def check_room(cache: Cache, tokens: int) -> None:
    """Raise CapacityError if a row cannot have so many tokens."""
    if tokens > cache.capacity:
        raise CapacityError(
            f"{tokens} tokens are {tokens - cache.capacity} over the {cache.capacity} of this cache",
            fix="Give fewer, or make a larger cache.",
        )


def widened(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Logits as an engine wrote them in float32; bfloat16 comes as uint16, for numpy has none."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32, copy=False)
