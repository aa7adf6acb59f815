"""Prompt lookup: guesses what comes next from where the context said the same before, and when guessing pays.

A guess is never an answer: the scheduler has the model compute what really comes after each guessed token, all in one pass, and
picks from that as it would without guesses. Sources: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, whose acceptance rule
for a guess that is no distribution is just this: draw from the model, go on while it drew the guess.
"""

from collections.abc import Iterable

_GRAMS = (4, 3, 2)  # tokens that must be the same, the longest that are first
_MOST = 10  # tokens of a guess
_LEAST = 3
_HOPE = 1.0  # guessed tokens that a pass is expected to give, before anything is known
_GAIN, _SECONDS = 0.5, 0.2  # weights of the last pass in what one is expected to give, and to take
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256  # tokens without guesses once they did not pay
_MARGIN = 1.03


class Timing:
    """What a step and a pass over a guess take, in seconds; one for an engine. Until both are known a pass counts as a step."""

    def __init__(self) -> None:
        self._step = self._pass = 0.0

    def saw_step(self, seconds: float) -> None:
        """One row decoded a token."""
        self._step = _blend(self._step, seconds)

    def saw_pass(self, seconds: float) -> None:
        """One row had a guess checked."""
        self._pass = _blend(self._pass, seconds)

    @property
    def cost(self) -> float:
        """Of a pass, in steps."""
        return self._pass / self._step if self._pass and self._step else 1.0


class Lookup:
    """Guesses for one sequence, which begins as `prompt`."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in _GRAMS]  # by n-gram: the place behind its last one
        self._gain, self._pause, self._silent = _HOPE, _FIRST_PAUSE, 0
        self._trials = (
            2  # so many guesses are made whatever is expected of them: an answer often begins with words of its own
        )
        self._behind: list[int] = []  # of each n-gram that the context ends in, where it ended before; longest first
        for token in prompt:
            self.push(int(token))

    def push(self, token: int) -> None:
        """A token came."""
        self._tokens.append(token)
        self._silent = max(0, self._silent - 1)
        self._behind, end = [], len(self._tokens)
        for size, after in zip(_GRAMS, self._after, strict=True):
            if end >= size:
                gram = tuple(self._tokens[-size:])
                if gram in after:
                    self._behind.append(after[gram])
                after[gram] = end

    def guess(self, most: int, cost: float) -> list[int]:
        """What may come next, at most `most` tokens; nothing where that is not worth the `cost` of a pass, in steps."""
        if self._silent or not self._behind:
            return []
        if 1 + self._gain < _MARGIN * cost and not self._trials:
            self._silent, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._trials = 1
            return []
        size = min(most, max(_LEAST, min(_MOST, 2 + round(2 * self._gain))))
        said = self._tokens[self._behind[0] :]
        return [said[place % len(said)] for place in range(size)]  # what the context ends in may be what it repeats

    def saw(self, accepted: int) -> None:
        """So many tokens of the last guess came."""
        self._trials = max(0, self._trials - 1)
        self._gain += _GAIN * (accepted - self._gain)
        if accepted:
            self._pause = _FIRST_PAUSE


def _blend(known: float, seen: float) -> float:
    return known + _SECONDS * (seen - known) if known else seen
