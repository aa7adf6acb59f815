"""A draft: a smaller model of the same tokens guesses what comes next. How many tokens is learned from what became of its guesses.

As with prompt lookup a guess is never an answer; see there. The draft guesses greedily, whatever the answer is sampled like: the rule
that the model's own draws decide keeps the model's distribution with any guess. Source: Leviathan et al. 2023, section 3.4 of how many.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headfold.runtime.backend import CHUNK, Backend
from headfold.runtime.errors import InputError
from headfold.runtime.scheduling.lookup import Timing, alike
from headfold.runtime.text import Text

_MOST = 8  # tokens of a guess
_MARGIN = 1.05
_MEMORY = 0.7  # weight of what is known of a draft once one more guess was checked
_RIGHT, _TRIED = 1.5, 2.0  # tokens that are counted as guessed before anything is known
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 256  # tokens without guesses once they did not pay, but for one at the end
_BEHIND = 32  # tokens: a draft that lacks more catches up before it is asked


def check_draft(text: Text, all_logits: bool, draft: Text) -> None:
    """Raise InputError if one bundle, of all logits or not, cannot have another one guess for it."""
    if not all_logits:
        raise InputError(
            "computes the last token's logits only, so what a draft guesses cannot be checked",
            where=text.bundle,
            fix="Export it with --all-logits, or leave the draft out.",
        )
    text.check_same_tokens(draft)


class Draft:
    """An engine with a cache of its own, of the one sequence that it guesses for. Only the scheduler's thread is here.

    Its tokens mean the same as the model's as far as both have `vocab_size` of them.
    """

    def __init__(self, backend: Backend[Any], vocab_size: int) -> None:
        self._backend, self._vocab_size = backend, vocab_size
        _, self._capacity = backend.largest_cache(1)
        self._cache: Any = None
        self._tokens = np.empty(0, np.int64)  # that the cache has
        self._of: tuple[object, bool] | None = None  # whose they are, and whether others may start from them

    def guess(self, context: Sequence[int], size: int, owner: object, shared: bool) -> list[int]:
        """At most `size` tokens after a context; none while the draft catches up, or where it cannot.

        `shared`: the owner's tokens may be kept for others, and those of others that are shared be used.
        """
        size, ids = min(size, self._capacity - len(context)), np.array(context, np.int64)
        if size < 1 or ids.max() >= self._vocab_size:
            return []
        if self._cache is None:
            self._cache = self._backend.new_cache(1, self._capacity)
        if self._of is None or (self._of[0] is not owner and not (self._of[1] and shared)):
            self._tokens = self._tokens[:0]
        self._of = owner, shared
        known = alike(self._tokens, ids[:-1])  # what was guessed wrong is forgotten; the last one's logits are wanted
        self._cache.lengths[0], self._tokens = known, ids[:known]
        if len(ids) - known > _BEHIND:
            end = min(known + CHUNK, len(ids) - 1)
            self._backend.prefill(self._cache, 0, ids[known:end])
            self._tokens = ids[:end]
            return []
        logits = self._backend.prefill(self._cache, 0, ids[known:])
        guessed: list[int] = []
        while True:
            guessed.append(int(logits[: self._vocab_size].argmax()))
            if len(guessed) == size:
                break
            logits = self._backend.decode(self._cache, np.array(guessed[-1:]), np.ones(1, np.bool_))[0]
        self._tokens = np.concatenate((ids, np.array(guessed[:-1], np.int64)))
        return guessed

    def free(self) -> None:
        """Give the cache's memory back."""
        self._cache = self._of = None
        self._tokens = self._tokens[:0]


class Trust:
    """In a draft, of one sequence: how many tokens to have it guess, if any."""

    def __init__(self) -> None:
        self._right, self._tried = _RIGHT, _TRIED
        self._silent, self._pause, self._trial = 0, _FIRST_PAUSE, False

    def size(self, most: int, timing: Timing) -> int:
        """Tokens that are worth guessing, at most `most`. Called for each step that could have a guess."""
        if self._silent:
            self._silent -= 1
            return 0
        right, most = self._right / self._tried, min(most, _MOST)
        worth = {n: _expected(right, n) / (timing.cost + n * timing.drafted) for n in range(1, most + 1)}
        best = max(worth, key=worth.__getitem__, default=0)
        if best and worth[best] < _MARGIN and not self._trial:
            self._silent, self._pause, self._trial = self._pause, min(2 * self._pause, _LONGEST_PAUSE), True
            return 0
        return best

    def saw(self, guessed: int, accepted: int) -> None:
        """So many of the guessed tokens came."""
        self._right = _MEMORY * self._right + accepted
        self._tried = _MEMORY * self._tried + accepted + (accepted < guessed)
        self._trial = False
        if accepted:
            self._pause = _FIRST_PAUSE


def _expected(right: float, guessed: int) -> float:
    """Tokens that come of a pass, its own included, where each guessed one is right as often as that."""
    return sum(right**number for number in range(guessed + 1))
