"""Scores of tokens from logits, and the perplexity of documents, window by window, so that memory does not grow with them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.errors import InputError

Score = Callable[[list[int]], "TokenScores"]  # as `Model.score`


@dataclass(frozen=True)
class TokenScores:
    """Of each token: the natural logarithm of its probability, and whether it is the likeliest one."""

    logprobs: NDArray[np.float64]
    likeliest: NDArray[np.bool_]

    @staticmethod
    def of(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> "TokenScores":
        """Of tokens [S] that come where the model computed logits [S, V]."""
        scores = np.empty(len(tokens), np.float64)
        for index, (row, token) in enumerate(zip(logits, tokens, strict=True)):  # a row at a time: float64 takes memory
            wide = row.astype(np.float64)
            largest = wide.max()
            scores[index] = wide[token] - largest - math.log(np.exp(wide - largest).sum())
        return TokenScores(scores, logits.argmax(1) == tokens)

    @staticmethod
    def joined(parts: "Iterable[TokenScores]") -> "TokenScores":
        """One after the other."""
        every = list(parts)
        return TokenScores(
            np.concatenate([part.logprobs for part in every]), np.concatenate([part.likeliest for part in every])
        )


@dataclass(frozen=True)
class Perplexity:
    """What text costs: `nats` per token, of `tokens` in `documents`."""

    documents: int
    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        """e to the power of the nats; infinite where that is no float."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


def perplexity(score: Score, documents: Iterable[Iterable[int]], context: int, most: int | None = None) -> Perplexity:
    """Of documents given as token ids; each token but a document's first is predicted once, `most` tokens in all.

    A document is cut into windows of `context` tokens, each of which begins with the last token of the one before it.

    Raises:
        InputError: there are no two tokens to score, or the context is below two.
        CapacityError: the context is larger than the model's capacity.
    """
    if context < 2:
        raise InputError(f"a context of {context} tokens has none to predict", fix="Give 2 or more.")
    total, tokens, count = 0.0, 0, 0
    for document in documents:
        before = tokens
        for window in _windows(document, context):
            if most is not None:
                window = window[: 1 + most - tokens]
            scores = score(window).logprobs
            total, tokens = total - float(scores.sum()), tokens + len(scores)
            if tokens == most:
                break
        count += tokens > before
        if tokens == most:
            break
    if not tokens:
        raise InputError("there are no two tokens to score", fix="Give more text.")
    return Perplexity(count, tokens, total / tokens)


def _windows(document: Iterable[int], size: int) -> Iterator[list[int]]:
    """Each begins with the last token of the one before it, and has two tokens or more."""
    window: list[int] = []
    for token in document:
        window.append(token)
        if len(window) == size:
            yield window
            window = window[-1:]
    if len(window) > 1:
        yield window
