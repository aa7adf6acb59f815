"""From logits to tokens: greedy, or drawn after penalties, biases, temperature, top-k, top-p and min-p, in the order of transformers.

One `Sampler` serves one sequence; what it draws depends on its seed and its own logits only, never on its neighbours in a batch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.choosing.grammar import Form
from headfold.runtime.choosing.restrictions import Forbidden
from headfold.runtime.errors import InputError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what generation_config.json may have
OF_A_CALL = ("presence_penalty", "frequency_penalty")  # what only a caller asks for
_COLDEST = 1e-6  # below it float32 logits divided by the temperature overflow
_LARGEST = float(np.finfo(np.float32).max)
_OPENAIS = (lambda x: -2 <= x <= 2, "between -2 and 2; 0 is off")
_MOST_BIAS = 100.0
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x == 0 or _COLDEST <= x < np.inf, f"0 (greedy) or at least {_COLDEST}"),
    "top_k": (lambda x: x >= 0, "0 (off) or more"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1 (off)"),
    "min_p": (lambda x: 0 <= x <= 1, "between 0 (off) and 1"),
    "repetition_penalty": (lambda x: 0 < x < np.inf, "more than 0; 1 is off"),
    "presence_penalty": _OPENAIS,
    "frequency_penalty": _OPENAIS,
    "seed": (lambda x: x >= 0, "0 or more"),
}


def check_parameter(name: str, value: Any) -> str | None:
    """What a sampling parameter must be, where `value` is not that."""
    kind: Any = Integral if name in ("top_k", "seed") else Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return "a number, and whole for top_k and seed"
    within, text = _RANGES[name]
    try:
        return None if within(value if kind is Integral else float(value)) else text
    except OverflowError:  # of a number that no float is
        return text


@dataclass(frozen=True)
class SamplingParameters:
    """How to pick tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.

    `presence_penalty` is taken from the logit of each token the answer has already, `frequency_penalty` once for each time.

    Raises:
        InputError: a value is no number, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (*SAMPLING, *OF_A_CALL, "seed"):
            value = getattr(self, name)
            if (name, value) != ("seed", None) and (wrong := check_parameter(name, value)) is not None:
                raise InputError(f"{name} is {value!r}", fix=f"It must be {wrong}.")


LogitsProcessor = Callable[[list[int], NDArray[np.float32]], NDArray[np.float32]]


class Sampler:
    """Picks the tokens of one sequence; `row` is its number in the batch, `forbidden` what may not be picked.

    `bias` is added to the logits of its tokens. `processor` gets the answer's tokens and the logits [V] after penalties and bias, to
    change or replace; what it returns is what is sampled from, as far as `form` allows.

    Raises:
        InputError: a bias of a token that does not exist, or out of its range.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        vocab_size: int,
        prompt: Iterable[int],
        row: int = 0,
        forbidden: Forbidden | None = None,
        bias: Mapping[int, float] | None = None,
        processor: LogitsProcessor | None = None,
        form: Form | None = None,
    ) -> None:
        self.parameters, self._form = parameters, form
        if processor is not None and not callable(processor):
            raise InputError(f"logits_processor is a {type(processor).__name__}", fix="Give a function.")
        self._processor, self._answer = processor, list[int]()
        self._counts: NDArray[np.float32] | None = None
        if parameters.presence_penalty or parameters.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)
        self._bias = None if not bias else _biases(bias, vocab_size)
        seed = parameters.seed
        self._generator = np.random.default_rng(None if seed is None else [seed, row])
        self._forbidden = forbidden
        self._seen: NDArray[np.bool_] | None = None
        if parameters.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[list(prompt)] = True

    @property
    def complete(self) -> bool:
        """Whether the answer has its form, and nothing can be added."""
        return self._form is not None and self._form.complete

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """The next token, from finite logits [V], which are left as they are.

        Raises:
            InputError: every token is forbidden.
        """
        p = self.parameters
        if self._seen is not None:
            logits = penalized(logits, self._seen, p.repetition_penalty)
        if self._counts is not None:
            penalties = p.frequency_penalty * self._counts + p.presence_penalty * np.minimum(self._counts, 1)
            logits = logits - penalties.astype(np.float32)
        if self._bias is not None:
            logits = logits + self._bias
        if self._processor is not None:
            logits = _processed(self._processor, self._answer, logits)
        if self._form is not None:
            logits = np.where(self._form.allowed(), logits, np.float32(-np.inf))
        if self._forbidden is not None:
            logits = logits.copy()
            logits[self._forbidden.tokens()] = -np.inf
        if (self._form is not None or self._forbidden is not None) and logits.max() == -np.inf:
            raise InputError(
                "the bundle's generation_config.json forbids every token that may come",
                fix="Export it with another one, or ask for another grammar.",
            )
        token = int(logits.argmax()) if p.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self._processor is not None:
            self._answer.append(token)
        if self._forbidden is not None:
            self._forbidden.push(token)
        if self._form is not None:
            self._form.push(token)
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, probabilities = candidates(logits, self.parameters)
        cumulative = probabilities.cumsum(dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(tokens[min(drawn, len(tokens) - 1)])  # the product may round up to the whole


def _biases(bias: Mapping[int, float], vocab_size: int) -> NDArray[np.float32]:
    """What is added to the logits [V]."""
    if not isinstance(bias, Mapping):
        raise InputError(
            f"logit_bias is a {type(bias).__name__}", fix="Give a number for each token id, as {50: -100}."
        )
    result = np.zeros(vocab_size, np.float32)
    for token, value in bias.items():
        if not isinstance(token, Integral) or not 0 <= token < vocab_size:
            raise InputError(f"logit_bias has token {token!r}", fix=f"Token ids are 0 to {vocab_size - 1}.")
        if not isinstance(value, Real) or not -_MOST_BIAS <= value <= _MOST_BIAS:
            raise InputError(f"logit_bias of token {token} is {value!r}", fix="It must be between -100 and 100.")
        result[token] = value
    return result


def _processed(processor: LogitsProcessor, answer: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a caller's function makes of the logits: of the same shape, with a token that may come."""
    result = np.asarray(processor(list(answer), logits.copy()), np.float32)
    if result.shape != logits.shape or not np.isfinite(result.max()):
        raise InputError(
            f"logits_processor returned logits of the shape {list(result.shape)} and the maximum {result.max(initial=-np.inf)}",
            fix=f"Return {len(logits)} numbers, not all of them -inf.",
        )
    return result


def penalized(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Logits [V] with those of the tokens `seen` [V] made less likely. Source: Keskar et al. 2019 (CTRL), section 4.1."""
    result, scores = logits.copy(), logits[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        scores = np.where(scores > 0, scores / float(penalty), scores * float(penalty))
    result[seen] = scores.clip(-_LARGEST, _LARGEST)
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
    with np.errstate(over="ignore"):  # what is so far below the largest is never drawn
        probabilities = np.exp((scores - scores.max()) / min(float(p.temperature), _LARGEST))
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
