"""An engine without a model: its cache holds the tokens themselves, and the next token is a function of what a row of it holds.

So a token that is missing, stale or another row's shows in the answer. Rows between two active ones run along, as in the real ones.
"""

import queue
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from headfold.runtime.backend import decode_window
from headfold.runtime.choosing.sampling import Sampler, SamplingParameters
from headfold.runtime.scheduling.answers import Answers, deliver_here
from headfold.runtime.scheduling.host_rows import HostRows, lazy_zeros
from headfold.runtime.scheduling.request import Request
from headfold.runtime.scheduling.scheduler import Scheduler

VOCAB = 101
_PRIMES = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53])


def next_token(context: Any) -> int:
    """Of a sequence: every token and its place count."""
    tokens = np.asarray(context, np.int64)
    return int(((tokens + 1) * _PRIMES[np.arange(len(tokens)) % len(_PRIMES)]).sum() % VOCAB)


def answer_to(prompt: Any, count: int) -> list[int]:
    """The greedy answer, each token from scratch."""
    tokens = list(map(int, prompt))
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class TokenCache:
    """Tokens [B, 1, C, 1]."""

    tokens: Any
    lengths: Any
    capacity: int
    host: HostRows | None
    token_bytes: int = 8


class TokenEngine:
    """See the file. `calls` are what it was asked for: ("prefill", row, tokens) or ("decode", first row, end row)."""

    session = None
    vocab = VOCAB
    gives_all_logits = True
    gives_hidden_states = False

    def __init__(self, rows: int = 4, capacity: int = 400, host: bool = True) -> None:
        self.rows, self.capacity, self.host = rows, capacity, host
        self.calls: list[tuple[str, int, int]] = []
        self.caches: list[TokenCache] = []
        self.turn = threading.Semaphore(1 << 30)  # of one call each; a test may take them all
        self.waits = threading.Event()  # set when a call wants its turn
        self.broken: Exception | None = None

    def hold(self) -> None:
        """From now on each call waits until `turn` is released."""
        self.turn = threading.Semaphore(0)

    def largest_cache(self, rows: int) -> tuple[int, int]:
        return min(rows, self.rows), self.capacity

    def new_cache(self, batch: int, capacity: int) -> TokenCache:
        tokens = lazy_zeros((batch, 1, capacity, 1), np.dtype(np.int64))
        tokens[...] = 77  # nobody may count on zeros
        cache = TokenCache(tokens, np.zeros(batch, np.int64), capacity, HostRows([tokens]) if self.host else None)
        self.caches.append(cache)
        return cache

    def prefill(self, cache: TokenCache, row: int, ids: Any, all_logits: bool = False) -> Any:
        self._take_turn(("prefill", row, len(ids)))
        start = int(cache.lengths[row])
        assert len(ids)
        assert start + len(ids) <= cache.capacity
        cache.tokens[row, 0, start : start + len(ids), 0] = ids
        if not all_logits:
            cache.lengths[row] += len(ids)
            return self._logits(cache, row)
        every = []
        for _ in ids:
            cache.lengths[row] += 1
            every.append(self._logits(cache, row))
        return np.stack(every)

    def decode(self, cache: TokenCache, tokens: Any, active: Any) -> Any:
        window = decode_window(cache, active)
        self._take_turn(("decode", window.first, window.end))
        logits = np.full((len(cache.lengths), self.vocab), np.nan, np.float32)
        for row in range(window.first, window.end):
            place = min(int(cache.lengths[row]), cache.capacity - 1)
            cache.tokens[row, 0, place, 0] = tokens[row] if active[row] else 66
        cache.lengths[window.rows] += 1
        for row in window.rows:
            logits[row] = self._logits(cache, row)
        return logits

    def next_token(self, context: Any) -> int:
        return next_token(context)

    def _take_turn(self, call: tuple[str, int, int]) -> None:
        self.waits.set()
        self.turn.acquire()
        self.calls.append(call)
        if self.broken is not None:
            raise self.broken

    def _logits(self, cache: TokenCache, row: int) -> Any:
        logits = np.zeros(self.vocab, np.float32)
        logits[self.next_token(cache.tokens[row, 0, : cache.lengths[row], 0])] = 1
        return logits


def ask(scheduler: Scheduler, *prompts: Any, new: int = 8, **options: Any) -> Answers:
    """One call for greedy answers to prompts of tokens."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests = [
        Request(
            index,
            np.asarray(prompt, np.int64),
            new,
            frozenset(),
            Sampler(SamplingParameters(), VOCAB, prompt),
            None,
            deliver_here(events),
            **options,
        )
        for index, prompt in enumerate(prompts)
    ]
    answers = Answers(requests, events, None)
    scheduler.submit(requests)
    return answers


def tokens_of(answers: Answers) -> list[list[int]]:
    """Waits for all of them."""
    return [generation.token_ids for generation in answers.generations(answers)]
