"""Prompt lookup: guesses what comes next from where the context said the same before, and when guessing pays.

A guess is never an answer: the scheduler has the model compute what really comes after each guessed token, all in one pass, and
picks from that as it would without guesses. Sources: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, whose acceptance rule
for a guess that is no distribution is just this: draw from the model, go on while it drew the guess.

What a guess is worth is learned for each length of match apart, and where it is worth too little, for nothing: it is only compared with
what comes anyway.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GRAMS = (6, 4, 3, 2)  # tokens that must be the same, the longest that are first
_HOPES = (3.0, 2.0, 1.0, 0.5)  # guessed tokens that are expected to come after each, before anything is known
_LEAST, _MOST = 3, 12  # tokens of a guess
_GAIN, _SECONDS = 0.4, 0.2  # weights of the last guess in what one is expected to give, and to take
_MARGIN = 1.05


class Timing:
    """What a step, a pass over a guess and a token of a draft take, in seconds; one for an engine. Not known yet counts as little."""

    def __init__(self) -> None:
        self._step = self._pass = self._drafted = 0.0

    def saw_step(self, seconds: float) -> None:
        """One row decoded a token."""
        self._step = _blend(self._step, seconds)

    def saw_pass(self, seconds: float) -> None:
        """One row had a guess checked."""
        self._pass = _blend(self._pass, seconds)

    def saw_draft(self, seconds: float, tokens: int) -> None:
        """A draft guessed so many tokens."""
        self._drafted = _blend(self._drafted, seconds / tokens)

    @property
    def cost(self) -> float:
        """Of a pass, in steps."""
        return self._pass / self._step if self._pass and self._step else 1.0

    @property
    def drafted(self) -> float:
        """What a token that a draft guesses costs, in steps."""
        return self._drafted / self._step if self._step else 0.0


@dataclass
class _Match:
    """The context ends in an n-gram that ended before, behind which `place` is; `gram` is its number in `_GRAMS`."""

    gram: int
    place: int


class Lookup:
    """Guesses for one sequence, which begins as `prompt`."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.tokens: list[int] = []  # so far
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in _GRAMS]  # by n-gram: the place behind its last one
        self._gains = list(_HOPES)
        self._longest: _Match | None = None  # of the context's end
        self._guessed = 0  # the n-gram of the last guess
        self._watched: _Match | None = None  # a guess that was not worth a pass; its place goes on with the context
        self._right = 0  # tokens of it that came
        for token in prompt:
            self.push(int(token))

    def push(self, token: int) -> None:
        """A token came."""
        self.tokens.append(token)
        self._watch(token)
        self._longest, end = None, len(self.tokens)
        for number, (size, after) in enumerate(zip(_GRAMS, self._after, strict=True)):
            if end >= size:
                gram = tuple(self.tokens[-size:])
                if self._longest is None and gram in after:
                    self._longest = _Match(number, after[gram])
                after[gram] = end

    def guess(self, most: int, cost: float) -> list[int]:
        """What may come next, at most `most` tokens; nothing where that is not worth the `cost` of a pass, in steps."""
        match = self._longest
        if match is None:
            return []
        gain = self._gains[match.gram]
        if 1 + gain < _MARGIN * cost:
            if self._watched is None:
                self._watched, self._right = match, 0
            return []
        self._guessed, self._watched = match.gram, None
        size = min(most, max(_LEAST, min(_MOST, 2 + round(2 * gain))))
        said = self.tokens[match.place :]
        return [said[place % len(said)] for place in range(size)]  # what the context ends in may be what it repeats

    def saw(self, accepted: int) -> None:
        """So many tokens of the last guess came."""
        self._learn(self._guessed, accepted)

    def _watch(self, token: int) -> None:
        """Whether the watched guess is right in this token, too; once it is wrong, or long enough, what it was worth is known."""
        watched = self._watched
        if watched is None:
            return
        right = self.tokens[watched.place] == token
        self._right += right
        watched.place += 1
        if not right or self._right == _MOST:
            self._watched = None
            self._learn(watched.gram, self._right)

    def _learn(self, gram: int, accepted: int) -> None:
        self._gains[gram] += _GAIN * (accepted - self._gains[gram])


def alike(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    most = min(len(one), len(other))
    same = one[:most] == other[:most]
    return most if same.all() else int(same.argmin())


def _blend(known: float, seen: float) -> float:
    return known + _SECONDS * (seen - known) if known else seen
