"""From logits to tokens: greedy, or drawn after penalty, temperature, top-k, top-p and min-p, in the order of transformers.

One `Sampler` serves one sequence; what it draws depends on its seed and its own logits only, never on its neighbours in a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.errors import InputError

_COLDEST = 1e-6  # below it float32 logits divided by the temperature overflow


@dataclass(frozen=True)
class SamplingParameters:
    """How to pick tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.

    Raises:
        InputError: a value is no number, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("top_k", Integral), ("seed", Integral), *((name, Real) for name in _REALS)):
            value = getattr(self, name)
            if (not isinstance(value, kind) or isinstance(value, bool)) and (name, value) != ("seed", None):
                raise InputError(f"{name} is {value!r}", fix="It must be a number, and whole for top_k and seed.")
        ranges = {
            "temperature": (
                self.temperature == 0 or _COLDEST <= self.temperature < np.inf,
                f"0 (greedy) or at least {_COLDEST}",
            ),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "more than 0; 1 is off"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (good, text) in ranges.items():
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}", fix=f"It must be {text}.")


_REALS = ("temperature", "top_p", "min_p", "repetition_penalty")


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
        """The next token, from logits [V], which are left as they are."""
        p = self.parameters
        if self._seen is not None:
            logits = penalized(logits, self._seen, p.repetition_penalty)
        token = int(logits.argmax()) if p.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, probabilities = candidates(logits, self.parameters)
        cumulative = probabilities.cumsum(dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(tokens[min(drawn, len(tokens) - 1)])  # the product may round up to the whole


def penalized(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Logits [V] with those of the tokens `seen` [V] made less likely. Source: Keskar et al. 2019 (CTRL), section 4.1."""
    result = logits.copy()
    scores = result[seen]
    result[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    return result


def candidates(logits: NDArray[np.float32], p: SamplingParameters) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens that may be drawn, in no order, and their probabilities.

    Sources: top-k, Fan et al. 2018 section 5.1; top-p, Holtzman et al. 2019 section 3.1; min-p, Nguyen et al. 2024 section 3.
    """
    tokens = np.arange(len(logits))
    if 0 < p.top_k < len(logits):
        kth = np.partition(logits, -p.top_k)[-p.top_k]
        tokens = np.flatnonzero(logits >= kth)  # ties with the k-th stay, as in transformers
    scores = logits[tokens]
    probabilities = np.exp((scores - scores.max()) / p.temperature)
    probabilities /= probabilities.sum()
    if p.top_p < 1:
        # All tokens this unlikely weigh at most 1 - top_p together, so none belongs to the nucleus: only the others are sorted.
        likely = np.flatnonzero(probabilities > (1 - p.top_p) / len(probabilities))
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        cumulative = probabilities[order].cumsum(dtype=np.float64)
        size = 1 + int(np.searchsorted(cumulative, p.top_p))  # the fewest tokens that reach top_p, and at least one
        tokens, probabilities = tokens[order[:size]], probabilities[order[:size]]
    if p.min_p > 0:
        keep = probabilities >= p.min_p * probabilities.max()
        tokens, probabilities = tokens[keep], probabilities[keep]
    return tokens, probabilities / probabilities.sum()
