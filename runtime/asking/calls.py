"""A call of `generate` becomes requests: everything is checked before anything waits, and what is not given comes from the bundle."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

from headfold.runtime.asking.options import seconds, texts, whole
from headfold.runtime.asking.prompts import Prompts
from headfold.runtime.choosing.generation_settings import FILE, GenerationSettings
from headfold.runtime.choosing.grammar import Grammars
from headfold.runtime.choosing.restrictions import Forbidden
from headfold.runtime.choosing.sampling import (
    OF_A_CALL,
    SAMPLING,
    LogitsProcessor,
    Sampler,
    SamplingParameters,
    check_parameter,
)
from headfold.runtime.errors import BundleError, CapacityError, InputError
from headfold.runtime.manifest import Manifest
from headfold.runtime.scheduling.answers import Generation
from headfold.runtime.scheduling.request import Deliver, Request
from headfold.runtime.text import Detokenizer, Text, Tools

_DEFAULT_NEW_TOKENS = 256
_MOST_ANSWERS = 1 << 10  # of a prompt
_MOST_LOGPROBS = 20  # as OpenAI has it
Shape = Callable[[list[Generation]], Any]  # gives the generations of a call the form of its prompts


class Calls:
    """Makes requests for one bundle.

    `capacity` are the tokens that a prompt and its answer can have together; `checks_guesses`: see Backend.gives_all_logits;
    `speculates`: what calls do that do not say.
    """

    def __init__(
        self,
        text: Text,
        manifest: Manifest,
        settings: GenerationSettings,
        ends: frozenset[int],
        capacity: int,
        checks_guesses: bool,
        speculates: bool,
    ) -> None:
        self.prompts = Prompts(text, manifest.vocab_size)
        self._text, self._vocab_size, self._settings = text, manifest.vocab_size, settings
        self._ends, self._capacity = ends, capacity
        self._checks_guesses, self._speculates = checks_guesses, speculates

    def requests(
        self,
        prompt: Any,
        deliver: Deliver,
        *,
        tools: Tools = None,
        template_variables: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        n: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | None = None,
        json_schema: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        top_logprobs: int | None = None,
        timeout: float | None = None,
        reuse: bool = False,
        speculate: bool | None = None,
        **sampling: float | None,
    ) -> tuple[list[Request], Shape]:
        """The requests of all answers, and what shapes their generations. See `Options`, and `Model.generate` for what it raises."""
        prompts, single = self.prompts.read(prompt, tools, template_variables)
        parameters = self.parameters(sampling, seed)
        budgets = [self._budget(index, len(ids), max_new_tokens) for index, ids in enumerate(prompts)]
        stops = self._settings.stops if stop is None else texts("stop string", stop)
        if stops:
            _ = self._text.tokenizer  # stop strings need one
        count = whole("n", n, 1, _MOST_ANSWERS)
        top = None if top_logprobs is None else whole("top_logprobs", top_logprobs, 0, _MOST_LOGPROBS)
        deadline = None if timeout is None else time.monotonic() + seconds("timeout", timeout)
        if speculate and not self._checks_guesses:
            raise InputError(
                "the bundle computes the last token's logits only, so no guess can be checked",
                where=self._text.bundle,
                fix="Export it with --all-logits, or leave speculate out.",
            )
        formed = json_schema is not None or grammar is not None
        form = self._grammars.form(json_schema, grammar) if formed else None
        vocab, rules = self._vocab_size, self._settings.restrictions
        requests = []
        for index in range(len(prompts) * count):
            ids, budget = prompts[index // count], budgets[index // count]
            forbidden = Forbidden(rules, ids, self._ends, vocab) if rules else None
            own_form = None if form is None else form.copy()
            requests.append(
                Request(
                    index,
                    ids,
                    budget,
                    frozenset() if ignore_eos else self._ends,
                    Sampler(parameters, vocab, ids, index, forbidden, logit_bias, logits_processor, own_form),
                    Detokenizer(self._text.tokenizer, stops, int(ids[-1])) if self._text.has_tokenizer else None,
                    deliver,
                    reuse=reuse or count > 1,  # of one prompt, which is computed once
                    top=top,
                    deadline=deadline,
                    speculate=self._speculates if speculate is None else speculate,
                )
            )

        def shaped(generations: list[Generation]) -> Any:
            every = [generations[i : i + count] for i in range(0, len(generations), count)]
            of_prompts: list[Any] = every if n is not None else generations
            return of_prompts[0] if single else of_prompts

        return requests, shaped

    def parameters(self, given: Mapping[str, float | None], seed: int | None) -> SamplingParameters:
        """Given values first, then the bundle's, then what turns each off."""
        if unknown := set(given) - {*SAMPLING, *OF_A_CALL}:
            raise TypeError(f"generate() has no option {min(unknown)!r}")
        given = {name: value for name, value in given.items() if value is not None}
        defaults = self._settings.sampling
        for name in defaults.keys() - given.keys():
            if (wrong := check_parameter(name, defaults[name])) is not None:
                raise BundleError(
                    f"{name} is {defaults[name]!r}, and must be {wrong}",
                    where=self._text.bundle / FILE,
                    fix=f"Give {name}, or correct the checkpoint's file and export again.",
                )
        return SamplingParameters(**(defaults | given), seed=seed)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._text.tokenizer, self._vocab_size, self._ends)

    def _budget(self, index: int, length: int, asked: int | None) -> int:
        """How many tokens to generate at most for a prompt of `length` tokens."""
        capacity = self._capacity
        if asked is not None and (not isinstance(asked, Integral) or asked < 1):
            raise InputError(f"max_new_tokens is {asked!r}", fix="It must be a whole number, 1 or more.")
        over = length + (asked or 1) - capacity
        if over > 0:
            raise CapacityError(
                f"its {length} tokens and {asked or 1} new ones are {over} over the bundle's capacity of {capacity}",
                where=f"prompt {index}",
                fix="Shorten it, ask for fewer new tokens, or export with a larger --capacity.",
            )
        return asked or min(self._wanted(length), capacity - length)

    def _wanted(self, length: int) -> int:
        """How many tokens the bundle generates for a prompt of `length` tokens, if nobody says otherwise."""
        if self._settings.max_new_tokens is not None:
            return self._settings.max_new_tokens
        most = self._settings.max_length
        return _DEFAULT_NEW_TOKENS if most is None else max(1, most - length)
