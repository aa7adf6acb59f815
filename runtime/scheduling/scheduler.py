"""Runs the requests of all callers together on one engine: one thread, which lives while there is work, and one cache.

A turn is a part of one prompt, then a token for every row that has its prompt; rows join and leave between turns. Prompts take turns,
too, so a long one delays a short one by a part of it. Nothing here decides what an answer is: see Request.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.backend import CHUNK, Backend
from headfold.runtime.errors import CapacityError, ClosedError, InputError
from headfold.runtime.scheduling.drafting import Draft
from headfold.runtime.scheduling.lookup import Timing
from headfold.runtime.scheduling.request import Ids, Request
from headfold.runtime.scheduling.slots import Slot, Slots, next_part
from headfold.runtime.scheduling.waiting import Waiting

SLOTS = 16  # rows that decode together at most, by default
MOST_WAITING = 1024  # prompts
KEEP_BYTES = 1 << 30  # of the cache, for prompts that begin like earlier ones
_BESIDE = 128  # tokens of a prompt computed at a time where another row decodes or another prompt waits its turn
_LEAST = 3  # tokens that are left of a turn for one more prompt to have a part of it
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Status:
    """How busy a scheduler is, and what it did since it began."""

    waiting: int
    live: int
    slots: int
    prompt_tokens: int  # computed
    cached_tokens: int  # of prompts, that did not have to be
    new_tokens: int
    steps: int  # of decoding, each of one token or more
    guessed_tokens: int  # that were checked
    accepted_tokens: int  # of them, that came


class Scheduler:
    """Runs requests on `backend`, `slots` at a time; each has at most `capacity` tokens. A `draft` guesses for who speculates."""

    def __init__(
        self,
        backend: Backend[Any],
        *,
        slots: int = SLOTS,
        waiting: int = MOST_WAITING,
        keep_bytes: int = KEEP_BYTES,
        draft: Draft | None = None,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("waiting", waiting, 1), ("keep_bytes", keep_bytes, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}", fix=f"It must be a whole number, {least} or more.")
        self._backend, self._keep_bytes = backend, keep_bytes
        self._rows, self.capacity = backend.largest_cache(slots)
        self._lock = threading.Lock()  # of the queues, the thread, `_closed`
        self._waiting, self._jobs = Waiting(waiting), deque[Callable[[], None]]()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process = os.getpid()
        self._slots: Slots | None = None  # the thread's own, as are the counts
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._steps = 0
        self._guessed_tokens = self._accepted_tokens = 0
        self._timing, self._draft = Timing(), draft

    def submit(self, call: Sequence[Request]) -> None:
        """Queue the requests of one call; returns at once.

        Raises:
            BusyError: too many wait already.
            InputError: the scheduler is closed, this process was forked from the one that made it, or its own thread asks.
        """
        self._check_caller()
        if threading.current_thread() is self._thread:
            raise InputError("a logits_processor cannot wait for an answer of its own model", fix="Load another one.")
        with self._lock:
            self._check_open()
            self._waiting.add(call)
            self._start()

    def run(self, job: Callable[[], _Result]) -> _Result:
        """Something else on the engine, between two turns; waits for it. Raises InputError as `submit` does."""
        self._check_caller()
        if threading.current_thread() is self._thread:
            return job()
        future: Future[_Result] = Future()

        def fulfil() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # it is raised where it is waited for
                future.set_exception(error)

        with self._lock:
            self._check_open()
            self._jobs.append(fulfil)
            self._start()
        return future.result()

    def compute(self, cache: Any, ids: Ids) -> None:
        """Append tokens to the first row of a cache of one's own; others have their turns between its parts."""
        while len(ids):
            count = next_part(len(ids), CHUNK)
            self.run(partial(self._backend.prefill, cache, 0, ids[:count]))
            ids = ids[count:]

    def keep(self, ids: Ids, arrays: Sequence[NDArray[Any]]) -> None:
        """Remember tokens for calls that begin with them; see Slots.keep."""

        def job() -> None:
            self._have_slots().keep(ids, arrays)

        self.run(job)

    def status(self) -> Status:
        """How busy it is now."""
        slots = self._slots
        live = 0 if slots is None else len(slots.live)
        with self._lock:
            waiting = len(self._waiting)
        counts = (self._prompt_tokens, self._cached_tokens, self._new_tokens, self._steps)
        return Status(waiting, live, self._rows, *counts, self._guessed_tokens, self._accepted_tokens)

    def close(self) -> None:
        """End all requests with an error, and free the cache. Closing again does nothing."""
        if os.getpid() != self._process:  # the thread and its locks are another process's
            return
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._free()

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "the model was loaded before this process was forked, and its threads were not",
                fix="Load it after the fork, or start the process with multiprocessing's spawn.",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model is closed", fix="Load it again.")

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="headfold-scheduler", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Take turns until there is nothing to do."""
        while True:
            with self._lock:
                closed, job = self._closed, self._jobs.popleft() if self._jobs else None
                self._waiting.drop_over()
                if closed:
                    self._stop()
                idle = job is None and not len(self._waiting) and (self._slots is None or not self._slots.live)
                if closed or idle:
                    if self._slots is not None and not self._slots.has_kept:
                        self._free()
                    self._thread = None
                    return
            if job is not None:
                job()
            try:
                self._turn()
            except Exception as error:  # of the engine: whom it concerns is told, and the next ones are tried anew
                self._fail(error)

    def _turn(self) -> None:
        with self._lock:
            if not len(self._waiting) and self._slots is None:
                return
        slots = self._have_slots()
        for slot in slots.live:
            if slot.request is not None and slot.request.end_if_over():
                slots.release(slot)
        self._admit(slots)
        self._prefill(slots)
        slots.close_ranks()
        self._decode(slots)

    def _admit(self, slots: Slots) -> None:
        with self._lock:
            while (request := self._waiting.take(slots.place)) is not None:
                self._cached_tokens += request.cached_tokens

    def _prefill(self, slots: Slots) -> None:
        """A part of the prompt whose turn it is, or several prompts that are no longer than that together."""
        left = CHUNK if len(slots.live) == 1 else _BESIDE
        while left >= _LEAST and (turn := slots.prefilling):
            slot, request = turn[0], turn[0].request
            count = next_part(len(slot.pending), left)
            logits = self._backend.prefill(slots.cache, slot.row, slot.pending[:count])
            slots.advance(slot, count)
            left -= count
            self._prompt_tokens += count
            if request is not None and not len(slot.pending):
                self._push(slots, slot, request, logits)

    def _decode(self, slots: Slots) -> None:
        decoding = slots.decoding
        if not decoding or (len(decoding) == 1 and self._check_guess(slots, decoding[0])):
            return
        rows = len(slots.cache.lengths)
        tokens, active = np.zeros(rows, np.int64), np.zeros(rows, np.bool_)
        for slot in decoding:
            active[slot.row] = True
            tokens[slot.row] = slot.request.token if slot.request is not None else 0
        begin = time.perf_counter()
        logits = self._backend.decode(slots.cache, tokens, active)
        self._steps += 1
        if len(decoding) == 1:
            self._timing.saw_step(time.perf_counter() - begin)
        for slot in decoding:
            slots.extend(slot, [int(tokens[slot.row])])
            if slot.request is not None:
                self._push(slots, slot, slot.request, logits[slot.row])

    def _check_guess(self, slots: Slots, slot: Slot) -> bool:
        """Compute a lone row's next token and some guessed ones in one pass. False: there is no guess worth it."""
        request, most = slot.request, slots.room(slot) - 1
        if request is None or not (guess := request.guess(most, self._timing, self._draft)):
            return False
        ids = [request.token, *guess]
        begin = time.perf_counter()
        logits = self._backend.prefill(slots.cache, slot.row, np.array(ids, np.int64), all_logits=True)
        self._timing.saw_pass(time.perf_counter() - begin)
        self._steps += 1
        self._guessed_tokens += len(guess)
        count = request.push_checked(logits, guess)
        self._new_tokens += count
        self._accepted_tokens += count - 1
        slots.cut(slot, len(ids) - count)
        slots.extend(slot, ids[:count])
        if request.finished:
            slots.release(slot)
        return True

    def _push(self, slots: Slots, slot: Slot, request: Request, logits: Any) -> None:
        request.push(logits)
        self._new_tokens += 1
        if request.finished:
            slots.release(slot)

    def _have_slots(self) -> Slots:
        if self._slots is None:
            self._slots = Slots(self._new_cache(), self._keep_bytes)
        return self._slots

    def _new_cache(self) -> Any:
        """As many rows as there is memory for."""
        rows = self._rows
        while True:
            try:
                return self._backend.new_cache(rows, self.capacity)
            except CapacityError:
                if rows == 1:
                    raise
                rows //= 2

    def _fail(self, error: Exception) -> None:
        """The engine broke: all that it was at work on ends with the error, and so do those that waited if there is no cache."""
        if self._slots is None:
            with self._lock:
                self._waiting.fail(error)
            return
        live = self._slots.live
        for slot in live:
            if slot.request is not None:
                slot.request.fail(error)
        self._slots.forget(live)

    def _free(self) -> None:
        """Give the memory of all caches back."""
        self._slots = None
        if self._draft is not None:
            self._draft.free()

    def _stop(self) -> None:
        """End everything; the lock is held."""
        error = ClosedError("the model was closed before the answer was complete", fix="Close it later.")
        self._waiting.fail(error)
        for slot in self._slots.live if self._slots is not None else ():
            if slot.request is not None:
                slot.request.fail(error)
        self._free()
        while self._jobs:
            self._jobs.popleft()()
