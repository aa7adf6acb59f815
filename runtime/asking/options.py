"""The options of a call, as a caller gives them; see `Calls` for what becomes of them."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

import numpy as np

from headfold.runtime.choosing.sampling import LogitsProcessor
from headfold.runtime.errors import InputError
from headfold.runtime.text import Tools


class Options(TypedDict, total=False):
    """Options of `Model.generate`; None is the same as not given."""

    max_new_tokens: int | None  # per answer; by default the bundle's, or 256, or what fits the cache
    temperature: float | None  # 0 is greedy; for this and the next four see SamplingParameters
    top_k: int | None  # this and the next two do nothing where it is greedy
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None  # end before any of these texts, [] before none; by default the bundle's
    seed: int | None  # makes sampling repeatable; a row draws the same whatever is beside it, of the same logits
    ignore_eos: bool  # go on after an end-of-sequence token
    tools: Tools  # JSON schemas of functions, for the chat template; this and the next are for messages only
    template_variables: Mapping[str, Any] | None  # of the chat template, as {"enable_thinking": False}
    n: int | None  # answers per prompt; computed once; if given, each gives a list of so many
    presence_penalty: float | None  # for this and the next see SamplingParameters
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None  # added to the logits of these tokens, -100 to 100
    logits_processor: LogitsProcessor | None  # see Sampler; runs in the scheduler's thread, so be quick
    json_schema: Mapping[str, Any] | None  # the answer is JSON of this schema; this and the next need headfold[grammar]
    grammar: str | None  # the answer is what this Lark grammar, of llguidance's kind, describes
    top_logprobs: (
        int | None
    )  # tell each token's probability, and those of so many likeliest (0 to 20); see TokenLogprob
    timeout: float | None  # seconds until all answers must be there: DeadlineError otherwise
    speculate: (
        bool | None
    )  # guess (the draft, or what the text said before), check several tokens at once; by default with a draft
    reuse: bool  # start from tokens that earlier calls left in the cache, and leave this one's; see `cached_tokens`


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A number of things; None is the least."""
    if value is None:
        return least
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}", fix=f"It must be a whole number, {least} to {most}.")
    return int(value)


def seconds(name: str, value: Any) -> float:
    """A time, which is more than nothing."""
    if not isinstance(value, Real) or not float(value) > 0:
        raise InputError(f"{name} is {value!r}", fix="It must be seconds, more than 0.")
    return float(value)


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """One text or several, none of them empty."""
    found: list[str] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not all(isinstance(text, str) and text for text in found):
        raise InputError(f"a {name} is empty, or no text", fix="Give texts of at least one character.")
    return found
