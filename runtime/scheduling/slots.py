"""The rows of one cache as slots: who has which, what each remembers, and where a new prompt goes.

A slot that is free may be kept: its tokens stay, and a prompt that begins alike starts from them. Only the scheduler's thread is here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.backend import Cache
from headfold.runtime.errors import BusyError, CapacityError, InputError
from headfold.runtime.scheduling.lookup import alike
from headfold.runtime.scheduling.request import Ids, Request

_WORTH_WAITING = 64  # tokens: for so many more that another prompt just computes, a prompt waits until it has them
_WORTH_MOVING = 64  # tokens of cache that may be moved for each step that is then a row narrower
_NOTHING = np.empty(0, np.int64)


def next_part(pending: int, most: int) -> int:
    """Tokens of a prompt to compute next: at most `most`, which is 3 or more.

    Kernels for one row round otherwise than those for several: with weights of four or eight bits, by tenths of a nat. In blocks of
    128 they take rows two by two, and what is left of an odd number alone. So parts are even, but for a prompt's last, which has two
    tokens at least: what was cached, and in which parts the rest comes, moves an answer much less.
    """
    if pending <= most:
        return pending
    count = most - most % 2
    return count - 2 * (pending - count == 1)


@dataclass
class Slot:
    """A row of the cache. It is free if it has no request; `pending` are the prompt's tokens that it has not computed yet."""

    row: int
    request: Request | None = None
    pending: Ids = field(default_factory=lambda: _NOTHING)
    used: int = 0  # when it was last, in admissions


class Slots:
    """All rows of a cache. `keep_bytes`: what the tokens of free slots may take together."""

    def __init__(self, cache: Cache, keep_bytes: int) -> None:
        self.cache, self._keep_bytes = cache, keep_bytes
        rows = len(cache.lengths)
        self._all = [Slot(row) for row in range(rows)]
        self._tokens = np.zeros((rows, cache.capacity), np.int64)  # that each row has, as far as its length
        self._clock = 0

    @property
    def live(self) -> list[Slot]:
        """Slots with a request, by row."""
        return sorted((slot for slot in self._all if slot.request is not None), key=lambda slot: slot.row)

    @property
    def decoding(self) -> list[Slot]:
        """Live slots that have all of their prompt, by row."""
        return [slot for slot in self.live if not len(slot.pending)]

    @property
    def prefilling(self) -> list[Slot]:
        """The other live ones, the one that waits longest first."""
        return sorted((slot for slot in self.live if len(slot.pending)), key=lambda slot: slot.used)

    @property
    def has_kept(self) -> bool:
        """Whether a free slot remembers anything."""
        return any(self._length(slot) for slot in self._free())

    def place(self, request: Request) -> bool:
        """Give a request a slot, with what there is of its prompt. False: none is free, or another one soon has much of its prompt."""
        free = self._free()
        if not free:
            return False
        source, shared = None, 0
        if request.reuse:
            sources = free if self.cache.host is None else self._all  # what is in use can only be copied
            shared, source = max(((self._shared(slot, request), slot) for slot in sources), key=lambda pair: pair[0])
            if self.cache.host is not None and self._soon(request) > shared + _WORTH_WAITING:
                return False
        slot = self._home(free, source if shared else None, shared)
        if slot is not source and source is not None and shared and self.cache.host is not None:
            self.cache.host.copy(source.row, slot.row, shared)
            self._tokens[slot.row, :shared] = self._tokens[source.row, :shared]
        self.cache.lengths[slot.row] = shared
        request.cached_tokens = shared
        slot.request, slot.pending = request, request.ids[shared:]
        self._touch(slot)
        return True

    def advance(self, slot: Slot, count: int) -> None:
        """So many of the pending tokens are in the cache now."""
        end = self._length(slot)
        self._tokens[slot.row, end - count : end] = slot.pending[:count]
        slot.pending = slot.pending[count:]
        self._touch(slot)  # the others' turn

    def extend(self, slot: Slot, tokens: list[int]) -> None:
        """These are the last tokens in the cache now."""
        end = self._length(slot)
        self._tokens[slot.row, end - len(tokens) : end] = tokens

    def cut(self, slot: Slot, count: int) -> None:
        """Forget the last tokens: what comes next takes their place."""
        self.cache.lengths[slot.row] -= count

    def room(self, slot: Slot) -> int:
        """Tokens that still fit its row."""
        return self.cache.capacity - self._length(slot)

    def release(self, slot: Slot) -> None:
        """Its request is over."""
        keep = slot.request is not None and slot.request.reuse
        slot.request, slot.pending = None, _NOTHING
        self._touch(slot)
        if keep:
            self._trim()
        else:
            self.cache.lengths[slot.row] = 0

    def keep(self, ids: Ids, arrays: Sequence[NDArray[Any]]) -> None:
        """Remember tokens whose keys and values were computed elsewhere. See CacheState.load for what it raises."""
        if self.cache.host is None:
            raise InputError("the cache is in the GPU's memory", fix="Load it with provider 'cpu'.")
        if len(ids) * self.cache.token_bytes > self._keep_bytes:
            raise CapacityError(
                f"{len(ids)} tokens take more than the {self._keep_bytes:,} bytes that may be kept",
                fix="Give a larger keep_bytes.",
            )
        free = self._free()
        if not free:
            raise BusyError("all slots are in use", fix="Try again later.")
        slot = self._home(free, None, 0)
        self.cache.host.write(slot.row, arrays)
        self._tokens[slot.row, : len(ids)] = ids
        self.cache.lengths[slot.row] = len(ids)
        self._touch(slot)
        self._trim()

    def forget(self, slots: Iterable[Slot]) -> None:
        """Free slots whose contents are not to be trusted."""
        for slot in slots:
            slot.request, slot.pending = None, _NOTHING
            self.cache.lengths[slot.row] = 0

    def close_ranks(self) -> None:
        """Move rows together where that makes decode's window narrower, and pays before they are done."""
        while self.cache.host is not None and (move := self._move()) is not None:
            edge, hole = move
            self.cache.host.swap(edge.row, hole.row, max(self._length(edge), self._length(hole)))
            rows = [edge.row, hole.row]
            self.cache.lengths[rows] = self.cache.lengths[rows[::-1]]
            self._tokens[rows] = self._tokens[rows[::-1]]
            edge.row, hole.row = hole.row, edge.row

    def _move(self) -> tuple[Slot, Slot] | None:
        """A row at an end of decode's window, and a free one within."""
        decoding = self.decoding
        if len(decoding) < 2:
            return None
        first, last = decoding[0], decoding[-1]
        holes = [slot for slot in self._free() if first.row < slot.row < last.row]
        for edge, beside in ((last, decoding[-2]), (first, decoding[1])):
            for hole in holes:
                inner = max(hole.row, beside.row) if edge is last else min(hole.row, beside.row)  # the new end
                length = self._length(hole)  # each step attends to it, too
                saved = (_WORTH_MOVING * abs(edge.row - inner) + length) * (edge.request.left if edge.request else 0)
                if self._length(edge) + length <= saved:
                    return edge, hole
        return None

    def _home(self, free: list[Slot], source: Slot | None, shared: int) -> Slot:
        """The slot for a prompt that begins with `shared` tokens of a source, if there is any."""
        if source is not None and source.request is None:
            others = [slot for slot in free if slot is not source]
            if self.cache.host is None or not others or 2 * shared >= self._length(source):
                return source
            free = others  # what the source has beyond is worth more than the copying
        rows = [slot.row for slot in self.live]

        def preference(slot: Slot) -> tuple[bool, int, int]:
            distance = min((abs(slot.row - row) for row in rows), default=slot.row)
            kept = self._length(slot) > 0
            return kept, slot.used if kept else distance, slot.row

        return min(free, key=preference)

    def _shared(self, slot: Slot, request: Request) -> int:
        """Tokens of the prompt that the slot has, as far as they need not be computed: an even number, see `next_part`.

        Not a full row's last token either, which a window may have overwritten: a prompt is shorter than a row.
        """
        return alike(self._tokens[slot.row, : self._length(slot)], _reusable(request)) // 2 * 2

    def _soon(self, request: Request) -> int:
        """Tokens of the prompt that another slot will have once its own prompt is computed."""
        prompts = [slot.request.ids for slot in self.prefilling if slot.request is not None]
        return max((alike(ids, _reusable(request)) for ids in prompts), default=0)

    def _trim(self) -> None:
        """Forget what was used least recently, until the rest fits; what was used last stays only if it fits alone."""
        kept = sorted((slot for slot in self._free() if self._length(slot)), key=lambda slot: slot.used)
        while sum(map(self._length, kept)) * self.cache.token_bytes > self._keep_bytes:
            slot = kept.pop(0)
            self.cache.lengths[slot.row] = 0
            if self.cache.host is not None:
                self.cache.host.give_back(slot.row)

    def _free(self) -> list[Slot]:
        return [slot for slot in self._all if slot.request is None]

    def _length(self, slot: Slot) -> int:
        return int(self.cache.lengths[slot.row])

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock


def _reusable(request: Request) -> Ids:
    """All of a prompt but its last token, whose logits are wanted, and one that is computed with it: see `next_part`."""
    return request.ids[:-2]
