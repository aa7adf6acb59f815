"""A loaded bundle and what people do with it: generate, chat, score."""

import asyncio
import logging
import queue
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from headfold.runtime.backend import Backend
from headfold.runtime.choosing.generation_settings import FILE, read_generation_settings
from headfold.runtime.choosing.restrictions import Forbidden
from headfold.runtime.choosing.sampling import (
    OF_A_CALL,
    SAMPLING,
    LogitsProcessor,
    Sampler,
    SamplingParameters,
    check_parameter,
)
from headfold.runtime.errors import BundleError, CapacityError, InputError, printable
from headfold.runtime.manifest import Manifest
from headfold.runtime.scheduling.answers import (
    Answers,
    AsyncAnswers,
    Generation,
    deliver_here,
    deliver_in_loop,
)
from headfold.runtime.scheduling.request import Deliver, Delta, Ids, Request
from headfold.runtime.scheduling.scheduler import Scheduler, Status
from headfold.runtime.templates.chat_template import Messages
from headfold.runtime.text import Detokenizer, Text, Tools

__all__ = ["Delta", "Generation", "Model", "Options"]
_DEFAULT_NEW_TOKENS = 256
_logger = logging.getLogger("headfold")  # by default Python prints warnings as they are on standard error
_MOST_LOGPROBS = 20  # as OpenAI has it
_PART = 512  # tokens scored before others have their turn; a bundle of last logits takes a step for each of a thirty-second of them
_NO_PROMPT = "Give text, token ids, messages, or a list of them."


class Options(TypedDict, total=False):
    """Options of `Model.generate`; None is the same as not given."""

    max_new_tokens: int | None  # per answer; by default the bundle's, or 256, or what fits the cache
    temperature: float | None  # 0 is greedy; for this and the next four see SamplingParameters
    top_k: int | None  # this and the next two do nothing where it is greedy
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None  # end before any of these texts, [] before none; by default the bundle's
    seed: int | None  # makes sampling repeatable; a row draws the same whatever is beside it
    ignore_eos: bool  # go on after an end-of-sequence token
    tools: Tools  # JSON schemas of functions, for the chat template; this and the next are for messages only
    template_variables: Mapping[str, Any] | None  # of the chat template, as {"enable_thinking": False}
    n: int | None  # answers per prompt; if given, each prompt gives a list of so many
    presence_penalty: float | None  # for this and the next see SamplingParameters
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None  # added to the logits of these tokens, -100 to 100
    logits_processor: LogitsProcessor | None  # see Sampler; runs in the scheduler's thread, so be quick
    top_logprobs: (
        int | None
    )  # tell each token's probability, and those of so many likeliest (0 to 20); see TokenLogprob
    timeout: float | None  # seconds until all answers must be there: DeadlineError otherwise
    reuse: bool  # start from tokens that earlier calls left in the cache, and leave this one's; see `cached_tokens`


class Model:
    """A bundle, loaded. `session` is the backend's own object, an onnxruntime.InferenceSession, for people with their own loop.

    Threads and event loops may share it: what they ask for at the same time is decoded together.
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend[Any], **scheduling: int) -> None:
        """`scheduling`: see Scheduler."""
        self.bundle, self.manifest, self.backend = bundle, manifest, backend
        self.session = backend.session
        self._scheduler = Scheduler(backend, **scheduling)
        weakref.finalize(self, self._scheduler.close)  # at the interpreter's end, too
        self._text = Text(bundle)
        self._settings = read_generation_settings(bundle)
        ends = self._settings.eos_token_ids
        self.eos_token_ids = frozenset(_config_ends(manifest.config) if ends is None else ends)
        if ignored := self._settings.ignored:
            names = printable(", ".join(ignored))
            _logger.warning("%s: headfold does not do what these ask for: %s.", bundle / FILE, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is being generated with an error, and free the cache. Nothing can be asked for after it."""
        self._scheduler.close()

    @property
    def capacity(self) -> int:
        """Tokens that a prompt and its answer can have together."""
        return min(self.manifest.cache.capacity, self._scheduler.capacity)

    def status(self) -> Status:
        """How busy it is."""
        return self._scheduler.status()

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; InputError if it has none."""
        return self._text.tokenizer

    @property
    def temperature(self) -> Any:
        """That of the bundle's generation_config.json, whatever it has there; 0, which is greedy, where it does not sample."""
        return self._settings.sampling["temperature"]

    def chat_prompt(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        *,
        tools: Tools = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, by the bundle's chat template; InputError if it has none or refuses."""
        return self._text.chat_prompt(messages, add_generation_prompt, tools, template_variables)

    @overload
    def generate(self, prompt: Any, *, stream: Literal[True], **options: Unpack[Options]) -> Answers: ...
    @overload
    def generate(
        self,
        prompt: str | list[int] | list[dict[str, Any]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[list[dict[str, Any]]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> list[Generation]: ...
    @overload
    def generate(self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any: ...

    def generate(self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """Continue a prompt (text or token ids), answer messages, or do so for a list of them, of any lengths.

        What is not given comes from the bundle's generation_config.json; greedy, unless that or a given temperature samples.

        Args:
            prompt: text; token ids; messages `[{"role": ..., "content": text or parts}]`; or a list of these, which gives a list.
            stream: return an iterator of Deltas, which cancels when it is closed or dropped; otherwise a Generation, or a list of
                them for a list of prompts, or of `n`.
            options: see `Options`.

        Raises:
            InputError: an empty prompt, malformed messages, a token that does not exist, or a parameter out of range; also a
                text without a tokenizer or messages without a chat template in the bundle.
            CapacityError: prompt and answer do not fit the bundle's cache.
            BundleError: the chat template breaks its bounds, or the model computes NaN.
            BusyError: too many prompts wait for this model.
            DeadlineError: the answers were not complete when the time was over.
        """
        events: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        requests, shape = self._begin(prompt, deliver_here(events), **options)
        answers = Answers(requests, events, self)
        self._scheduler.submit(requests)
        if stream:
            return answers
        with answers:
            return shape(answers.generations(answers))

    @overload
    def agenerate(
        self, prompt: Any, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Coroutine[Any, Any, AsyncAnswers]: ...
    @overload
    def agenerate(
        self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Any]: ...

    async def agenerate(self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """`generate` for asyncio: `await` it, with `stream` for an asynchronous iterator. A cancelled task cancels its answers."""
        events: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        deliver = deliver_in_loop(events, asyncio.get_running_loop())
        requests, shape = await asyncio.to_thread(self._begin, prompt, deliver, **options)
        answers = AsyncAnswers(requests, events, self)
        self._scheduler.submit(requests)
        if stream:
            return answers
        async with answers:
            return shape(answers.generations([delta async for delta in answers]))

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Next-token logits after every token, for scoring: `ids` [S] or [B, S] gives float32 [S, vocab] or [B, S, vocab].

        A bundle exported with --all-logits computes them 512 tokens at a time; any other one takes a step per token, which is
        right but slow.

        Raises:
            InputError: no tokens, or one that does not exist.
            CapacityError: more tokens than the cache holds.
        """
        array = _integers(ids)
        if array.ndim not in (1, 2):
            raise InputError(f"token ids have the shape {list(array.shape)}", fix="Give [S] or [B, S].")
        rows = [self._checked(row) for row in np.atleast_2d(array)]
        length, capacity = array.shape[-1], self.capacity
        if length > capacity:
            raise CapacityError(
                f"{length} tokens are {length - capacity} over the capacity of {capacity}",
                where=self.bundle,
                fix="Score them in parts, or export with a larger --capacity.",
            )
        result = np.empty((len(rows), length, self.manifest.vocab_size), np.float32)
        part = _PART if self.manifest.logits == "all" else _PART // 32
        for index, row in enumerate(rows):
            cache = self._scheduler.run(lambda: self.backend.new_cache(1, length))
            for start in range(0, length, part):
                ids = row[start : start + part]
                result[index, start : start + part] = self._scheduler.run(
                    partial(self.backend.prefill, cache, 0, ids, all_logits=True)
                )
        return result[0] if array.ndim == 1 else result

    def _begin(
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
        top_logprobs: int | None = None,
        timeout: float | None = None,
        reuse: bool = False,
        **sampling: float | None,
    ) -> tuple[list[Request], Callable[[list[Generation]], Any]]:
        """Check everything now. The requests of all answers, and what gives their generations the form of the prompts."""
        prompts, single = self._prompts(prompt, tools, template_variables)
        parameters = self._parameters(sampling, seed)
        budgets = [self._budget(index, len(ids), max_new_tokens) for index, ids in enumerate(prompts)]
        stops = self._settings.stops if stop is None else [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError("a stop string is empty, or no text", fix="Give texts of at least one character.")
        if stops:
            _ = self.tokenizer  # stop strings need one
        count = _whole("n", n, 1, 1 << 10)
        top = None if top_logprobs is None else _whole("top_logprobs", top_logprobs, 0, _MOST_LOGPROBS)
        if timeout is not None and not (isinstance(timeout, Real) and timeout > 0):
            raise InputError(f"timeout is {timeout!r}", fix="It must be seconds, more than 0.")
        deadline = None if timeout is None else time.monotonic() + timeout
        vocab, rules = self.manifest.vocab_size, self._settings.restrictions
        requests = []
        for index in range(len(prompts) * count):
            ids, budget = prompts[index // count], budgets[index // count]
            forbidden = Forbidden(rules, ids, self.eos_token_ids, vocab) if rules else None
            requests.append(
                Request(
                    index,
                    ids,
                    budget,
                    frozenset() if ignore_eos else self.eos_token_ids,
                    Sampler(parameters, vocab, ids, index, forbidden, logit_bias, logits_processor),
                    Detokenizer(self.tokenizer, stops, int(ids[-1])) if self._text.has_tokenizer else None,
                    deliver,
                    reuse=reuse or count > 1,  # of one prompt, which is computed once
                    top=top,
                    deadline=deadline,
                )
            )

        def shaped(generations: list[Generation]) -> Any:
            every = [generations[i : i + count] for i in range(0, len(generations), count)]
            of_prompts: list[Any] = every if n is not None else generations
            return of_prompts[0] if single else of_prompts

        return requests, shaped

    def _prompts(self, prompt: Any, tools: Tools, variables: Mapping[str, Any] | None) -> tuple[list[Ids], bool]:
        """Token ids of each prompt, and whether there was only one, not in a list."""
        if _is_one(prompt):
            return [self.encode(prompt, tools, variables)], True
        if not isinstance(prompt, Sequence | np.ndarray):
            raise InputError(f"a prompt cannot be a {type(prompt).__name__}", fix=_NO_PROMPT)
        if not len(prompt):
            raise InputError("the prompt is empty", fix=_NO_PROMPT)
        return [self.encode(one, tools, variables) for one in prompt], False

    def encode(self, prompt: Any, tools: Tools = None, variables: Mapping[str, Any] | None = None) -> Ids:
        """Token ids of one prompt, which `generate` takes in its place. Raises InputError as it does."""
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and any(isinstance(x, Mapping) for x in prompt):
            return self._checked(self._text.encode_chat(prompt, tools, variables))
        if tools is not None or variables is not None:
            raise InputError("tools and template_variables are for messages", fix="Give messages, or leave them out.")
        return self._checked(self._text.encode(prompt) if isinstance(prompt, str) else prompt)

    def _checked(self, ids: ArrayLike) -> Ids:
        """Token ids [S] of one sequence, S >= 1, all in the vocabulary."""
        array = _integers(ids)
        if array.ndim != 1:
            raise InputError("a prompt is neither text nor token ids nor messages", fix=_NO_PROMPT)
        if array.min() < 0 or array.max() >= self.manifest.vocab_size:
            bad = int(array.min()) if array.min() < 0 else int(array.max())
            raise InputError(
                f"token {bad} is not in the vocabulary", fix=f"Token ids are 0 to {self.manifest.vocab_size - 1}."
            )
        return array.astype(np.int64)

    def _budget(self, index: int, length: int, asked: int | None) -> int:
        """How many tokens to generate at most for a prompt of `length` tokens."""
        capacity = self.capacity
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

    def _parameters(self, given: Mapping[str, float | None], seed: int | None) -> SamplingParameters:
        """Given values first, then the bundle's, then what turns each off."""
        if unknown := set(given) - {*SAMPLING, *OF_A_CALL}:
            raise TypeError(f"generate() has no option {min(unknown)!r}")
        given = {name: value for name, value in given.items() if value is not None}
        defaults = self._settings.sampling
        for name in defaults.keys() - given.keys():
            if (wrong := check_parameter(name, defaults[name])) is not None:
                raise BundleError(
                    f"{name} is {defaults[name]!r}, and must be {wrong}",
                    where=self.bundle / FILE,
                    fix=f"Give {name}, or correct the checkpoint's file and export again.",
                )
        return SamplingParameters(**(defaults | given), seed=seed)


def _config_ends(config: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer by the model's own configuration."""
    ends = config.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """A number of things; None is the least."""
    if value is None:
        return least
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}", fix=f"It must be a whole number, {least} to {most}.")
    return int(value)


def _is_one(prompt: Any) -> bool:
    """Whether it is one prompt, not a list of them."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    first = prompt[0] if isinstance(prompt, Sequence) and len(prompt) else None
    return isinstance(prompt, str) or isinstance(first, int | np.integer | Mapping)


def _integers(ids: ArrayLike) -> NDArray[np.integer[Any]]:
    """An array of at least one integer."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # rows of different lengths
        raise InputError("the rows of token ids differ in length", fix="Give them one by one.") from error
    if array.size == 0:
        raise InputError("the prompt is empty", fix="Give at least one token.")
    if array.dtype.kind not in "iu":
        raise InputError("token ids are not integers", fix=_NO_PROMPT)
    return array
