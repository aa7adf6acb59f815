"""From logits to tokens: greedy, or drawn after penalty, temperature, top-k, top-p and min-p, in the order of transformers.

One `Sampler` serves one sequence; what it draws depends on its seed and its own logits only, never on its neighbours in a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.errors import InputError


@dataclass(frozen=True)
class SamplingParameters:
    """How to pick tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature < np.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "more than 0"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (good, text) in ranges.items():
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}", fix=f"It must be {text}.")


class Sampler:
    """Picks the tokens of one sequence; `row` is its number in the batch."""

    def __init__(self, parameters: SamplingParameters, vocab_size: int, prompt: Iterable[int], row: int = 0) -> None:
        self.parameters = parameters
        seed = parameters.seed
        self._generator = np.random.default_rng(None if seed is None else [seed, row])
        self._seen: NDArray[np.bool_] | None = None
        if parameters.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[list(prompt)] = True

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits [V]."""
        p = self.parameters
        if self._seen is not None:
            penalized = np.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = np.where(self._seen, penalized, logits)
        token = int(logits.argmax()) if p.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, weights = candidates(logits, self.parameters)
        cumulative = weights.cumsum()
        return int(tokens[np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")])


def candidates(logits: NDArray[np.float32], p: SamplingParameters) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities, likeliest first.

    Sources: top-k, Fan et al. 2018 section 5.1; top-p, Holtzman et al. 2019 section 3.1; min-p, Nguyen et al. 2024 section 3.
    """
    scaled = logits.astype(np.float64) / p.temperature  # [V]
    tokens = np.arange(len(scaled))
    if 0 < p.top_k < len(scaled):
        tokens = np.flatnonzero(
            scaled >= np.partition(scaled, -p.top_k)[-p.top_k]
        )  # ties with the k-th stay, as in transformers
    order = np.argsort(-scaled[tokens], kind="stable")
    tokens = tokens[order]
    probabilities = _softmax(scaled[tokens])
    if p.top_p < 1:
        before = probabilities.cumsum() - probabilities  # mass of the likelier ones
        keep = before < p.top_p
        keep[0] = True
        tokens, probabilities = tokens[keep], _softmax(scaled[tokens[keep]])
    if p.min_p > 0:
        keep = probabilities >= p.min_p * probabilities[0]
        tokens, probabilities = tokens[keep], _softmax(scaled[tokens[keep]])
    return tokens, probabilities


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())
