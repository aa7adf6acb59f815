"""Tokens that may not come next: suppressed ones, bad words, repeated n-grams, an end that comes too soon.

They mean what transformers' logits processors of the same names mean. `Restrictions` are a bundle's; a `Forbidden` serves one sequence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Restrictions:
    """What is forbidden, in transformers' names. Tokens that the vocabulary has not are of no effect."""

    suppress_tokens: tuple[int, ...] = ()  # never
    begin_suppress_tokens: tuple[int, ...] = ()  # not as the answer's first
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that never come as a whole
    no_repeat_ngram_size: int = 0  # so many tokens never come twice, prompt included; 0 is off
    min_length: int = 0  # tokens of prompt and answer before an end
    min_new_tokens: int = 0  # tokens of the answer before an end

    def __bool__(self) -> bool:
        """Whether anything is forbidden at all."""
        return self != Restrictions()


class Forbidden:
    """The forbidden tokens of one sequence, which begins as `prompt` [S] and ends with any of `ends`."""

    def __init__(self, restrictions: Restrictions, prompt: Ids, ends: frozenset[int], vocab_size: int) -> None:
        self._rules, self._ends, self._vocab = restrictions, ends, vocab_size
        self._ids, self._new = prompt, 0
        words = [word for word in restrictions.bad_words_ids if word and not (len(word) == 1 and word[0] in ends)]
        self._always = {*restrictions.suppress_tokens, *(word[0] for word in words if len(word) == 1)}
        self._words = [word for word in words if len(word) > 1]

    def tokens(self) -> list[int]:
        """What may not come next."""
        rules, found = self._rules, set(self._always)
        if self._new == 0:
            found.update(rules.begin_suppress_tokens)
        if self._new < rules.min_new_tokens or len(self._ids) < rules.min_length:
            found.update(self._ends)
        found.update(word[-1] for word in self._words if self._ids[1 - len(word) :].tolist() == list(word[:-1]))
        if rules.no_repeat_ngram_size:
            found.update(self._repetitions(rules.no_repeat_ngram_size))
        return [token for token in found if 0 <= token < self._vocab]

    def push(self, token: int) -> None:
        """A token came."""
        self._ids, self._new = np.append(self._ids, token), self._new + 1

    def _repetitions(self, size: int) -> list[int]:
        """Tokens that once followed what the last `size` - 1 tokens are."""
        ids, starts = self._ids, len(self._ids) - size + 1  # of whole n-grams
        if starts < 1:
            return []
        same = np.ones(starts, np.bool_)
        for place in range(size - 1):
            same &= ids[place : place + starts] == ids[starts + place]
        return [int(token) for token in ids[size - 1 :][same]]
