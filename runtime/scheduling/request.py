"""One prompt on its way to an answer: what was asked, and what each step's logits make of it.

The scheduler's thread owns a request from `submit` to its last delivery; whoever asked may only cancel it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.choosing.sampling import Sampler
from headfold.runtime.errors import BundleError, DeadlineError, HeadfoldError
from headfold.runtime.scheduling.drafting import Draft, Trust
from headfold.runtime.scheduling.lookup import Lookup, Timing
from headfold.runtime.text import Detokenizer

FinishReason = Literal["stop", "length"]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities: of the token that came, and of the likeliest, the likeliest first.

    They are of the logits as the model computed them, before penalties, biases and temperature.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to the answer number `index`; the last one of an answer has a finish reason.

    `text` may be empty, while a character or a possible stop string is incomplete; all deltas' texts joined are the answer's.
    """

    index: int
    text: str
    token_id: int
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None = None


Deliver = Callable[["Request", Delta | Exception], None]


class Request:
    """A prompt `ids` [S], at most `budget` new tokens, and where its deltas go. An exception is the last thing delivered, if any.

    Args:
        index: the number of its answer in the call.
        ids: the prompt.
        budget: new tokens at most.
        ends: tokens that end the answer.
        sampler: picks its tokens.
        writer: makes text of them, if there is a tokenizer.
        deliver: called in the scheduler's thread; must not block.
        reuse: start from tokens that are in the cache already, and leave its own there.
        top: so many likeliest tokens are told with each token; None tells no probabilities.
        deadline: on the monotonic clock.
        speculate: guess tokens and have the model check several at once, where that pays; the answer is the same.
    """

    def __init__(
        self,
        index: int,
        ids: Ids,
        budget: int,
        ends: frozenset[int],
        sampler: Sampler,
        writer: Detokenizer | None,
        deliver: Deliver,
        *,
        reuse: bool = False,
        top: int | None = None,
        deadline: float | None = None,
        speculate: bool = False,
    ) -> None:
        self.index, self.ids, self.budget, self.ends, self.reuse = index, ids, budget, ends, reuse
        self.cached_tokens = 0  # of the prompt, that did not have to be computed
        self.token = 0  # the last one
        self.new_tokens = 0
        self.finished = False  # nothing more is delivered
        self.cancelled = False
        self._sampler, self._writer, self._deliver, self._top = sampler, writer, deliver, top
        self._deadline = deadline
        self._lookup, self._trust, self._drafted = Lookup(ids) if speculate else None, Trust(), False

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.budget - self.new_tokens

    def guess(self, most: int, timing: Timing, draft: Draft | None) -> list[int]:
        """Tokens that may come next, where guessing pays: at most `most`, and none beyond the answer's end.

        What the text said before comes first, for it costs nothing to look up.
        """
        if self._lookup is None:
            return []
        most = min(most, self.left - 1)
        found = self._lookup.guess(most, timing.cost)
        self._drafted = not found
        if found or draft is None or not (size := self._trust.size(most, timing)):
            return found
        begin = time.perf_counter()
        found = draft.guess(self._lookup.tokens, size, self, self.reuse)
        if found:
            timing.saw_draft(time.perf_counter() - begin, len(found))
        return found

    def push_checked(self, logits: NDArray[np.float32], guess: list[int]) -> int:
        """Pick tokens from logits [S, V] after the last token and each of the last guess [S - 1], as long as they are those guessed.

        Returns:
            How many were picked.
        """
        for place, row in enumerate(logits):
            self.push(row)
            if self.finished or place == len(guess) or self.token != guess[place]:
                break
        if self._drafted:
            self._trust.saw(len(guess), place)
        elif self._lookup is not None:
            self._lookup.saw(place)
        return place + 1

    def end_if_over(self) -> bool:
        """Whether it ended before its answer did: cancelled, or past its deadline."""
        if self.cancelled:
            self.finished = True
        elif self._deadline is not None and time.monotonic() > self._deadline:
            self.fail(
                DeadlineError(
                    f"answer {self.index} had {self.new_tokens} of at most {self.budget} tokens when its time was over",
                    fix="Give a longer timeout, or ask for fewer tokens.",
                )
            )
        return self.finished

    def push(self, logits: NDArray[np.float32]) -> None:
        """Pick the next token from logits [V], which are left as they are, and deliver it."""
        try:
            delta = self._next(logits)
        except Exception as error:  # its own, as of a caller's logits_processor: the others go on
            self.fail(error)
            return
        self.finished = delta.finish_reason is not None
        self._deliver(self, delta)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.finished:
            self.finished = True
            self._deliver(self, error)

    def _next(self, logits: NDArray[np.float32]) -> Delta:
        if not np.isfinite(logits.max()):  # NaN, if there is any
            raise self._not_finite()
        self.token = token = self._sampler(logits)
        self.new_tokens += 1
        if self._lookup is not None:
            self._lookup.push(token)
        logprob = None if self._top is None else _logprob(logits, token, self._top)
        ended, text = token in self.ends, ""
        if self._writer is not None:
            text = self._writer.push(None if ended else token)
            ended = ended or self._writer.stopped
        ended = ended or self._sampler.complete
        reason: FinishReason | None = "stop" if ended else None if self.left else "length"
        if reason is not None and self._writer is not None:
            text += self._writer.push(None)
        return Delta(self.index, text, token, reason, logprob)

    def _not_finite(self) -> HeadfoldError:
        return BundleError(
            f"the logits of token {self.new_tokens + 1} of answer {self.index} are NaN or infinite, "
            f"{len(self.ids) + self.new_tokens} tokens in",
            fix="Its weights hold such numbers, or its dtype is too narrow: export with --dtype float32.",
        )


def _logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Of one token and of the `top` likeliest."""
    scores = logits.astype(np.float64)
    largest = scores.max()
    scores -= largest + np.log(np.exp(scores - largest).sum())
    likeliest: list[int] = []
    if top:
        found = np.argpartition(-scores, top - 1)[:top] if top < len(scores) else np.arange(len(scores))
        likeliest = found[np.argsort(-scores[found], kind="stable")].tolist()
    return TokenLogprob(token, float(scores[token]), tuple((one, float(scores[one])) for one in likeliest))
