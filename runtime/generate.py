"""A loaded bundle and what people do with it: generate, chat, score, embed."""

import asyncio
import logging
import queue
import weakref
from collections.abc import Coroutine, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from headfold.runtime.asking.calls import Calls
from headfold.runtime.asking.options import Options
from headfold.runtime.asking.prompts import integers
from headfold.runtime.backend import Backend
from headfold.runtime.choosing.generation_settings import FILE, read_generation_settings
from headfold.runtime.errors import CapacityError, InputError, printable
from headfold.runtime.manifest import Manifest
from headfold.runtime.measuring.embedding import Pooling, check_pooling, pooled
from headfold.runtime.measuring.scoring import TokenScores
from headfold.runtime.scheduling.answers import (
    Answers,
    AsyncAnswers,
    Generation,
    deliver_here,
    deliver_in_loop,
)
from headfold.runtime.scheduling.cache_state import CacheState
from headfold.runtime.scheduling.drafting import Draft, check_draft
from headfold.runtime.scheduling.reading import ReadByAnother, check_reader
from headfold.runtime.scheduling.request import Delta, Ids
from headfold.runtime.scheduling.scheduler import Scheduler, Status
from headfold.runtime.templates.chat_template import Messages
from headfold.runtime.text import Text, Tools

__all__ = ["Delta", "Generation", "Model", "Options"]
_logger = logging.getLogger("headfold")  # by default Python prints warnings as they are on standard error
_PART = 512  # tokens scored before others have their turn; a bundle of last logits takes a step for each of a thirty-second of them


class Model:
    """A bundle, loaded. `session` is the backend's own object, an onnxruntime.InferenceSession, for people with their own loop.

    Threads and event loops may share it: what they ask for at the same time is decoded together.
    """

    def __init__(
        self,
        text: Text,
        manifest: Manifest,
        backend: Backend[Any],
        draft: tuple[Text, Manifest, Backend[Any]] | None = None,
        prefill: tuple[Text, Manifest, Backend[Any]] | None = None,
        **scheduling: int,
    ) -> None:
        """`draft`: a smaller bundle of the same tokens, `prefill`: one of the same model; InputError where it is not.

        `scheduling`: see Scheduler.
        """
        if prefill is not None:
            other, other_manifest, reader = prefill
            check_reader(text.bundle, manifest, other.bundle, other_manifest)
            backend = ReadByAnother(backend, reader, manifest, text.bundle, other.bundle)
        self.bundle, self.manifest, self.backend = text.bundle, manifest, backend
        self.session = backend.session
        self._text = text
        drafting = None if draft is None else self._draft(*draft)
        self._scheduler = Scheduler(backend, draft=drafting, **scheduling)
        weakref.finalize(self, self._scheduler.close)  # at the interpreter's end, too
        self._settings = read_generation_settings(self.bundle)
        ends = self._settings.eos_token_ids
        self.eos_token_ids = frozenset(_config_ends(manifest.config) if ends is None else ends)
        self._calls = Calls(
            self._text,
            manifest,
            self._settings,
            self.eos_token_ids,
            self.capacity,
            checks_guesses=backend.gives_all_logits,
            speculates=draft is not None,
        )
        computing = [manifest] if prefill is None else [manifest, prefill[1]]
        self.cache_state = CacheState(self._scheduler, backend, computing, self._calls.prompts.encode)
        if ignored := self._settings.ignored:
            names = printable(", ".join(ignored))
            _logger.warning("%s: headfold does not do what these ask for: %s.", self.bundle / FILE, names)

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

    def special_token(self, name: str) -> int | None:
        """The id of a special token that the tokenizer's configuration names, as "eos_token"."""
        return self._text.special_token(name)

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
        requests, shape = self._calls.requests(prompt, deliver_here(events), **options)
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
        requests, shape = await asyncio.to_thread(self._calls.requests, prompt, deliver, **options)
        answers = AsyncAnswers(requests, events, self)
        self._scheduler.submit(requests)
        if stream:
            return answers
        async with answers:
            return shape(answers.generations([delta async for delta in answers]))

    def encode(self, prompt: Any, tools: Tools = None, variables: Mapping[str, Any] | None = None) -> Ids:
        """Token ids [S] of one prompt, which `generate` takes in its place. Raises InputError as it does."""
        return self._calls.prompts.encode(prompt, tools, variables)

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Next-token logits after every token, for scoring: `ids` [S] or [B, S] gives float32 [S, vocab] or [B, S, vocab].

        A bundle exported with --all-logits computes them 512 tokens at a time; any other one takes a step per token, which is
        right but slow.

        Raises:
            InputError: no tokens, or one that does not exist.
            CapacityError: more tokens than the cache holds.
        """
        array = integers(ids)
        if array.ndim not in (1, 2):
            raise InputError(f"token ids have the shape {list(array.shape)}", fix="Give [S] or [B, S].")
        rows = [self._calls.prompts.checked(row) for row in np.atleast_2d(array)]
        self._check_fits(array.shape[-1])
        result = np.empty((len(rows), array.shape[-1], self.manifest.vocab_size), np.float32)
        for index, row in enumerate(rows):
            for start, logits in self._logits(row):
                result[index, start : start + len(logits)] = logits
        return result[0] if array.ndim == 1 else result

    def score(self, ids: ArrayLike, start: int = 1) -> TokenScores:
        """How likely each of the tokens `ids[start:]` is after those before it; `start` is at least 1. The last one needs no room.

        Raises:
            InputError: a token does not exist, or there is none to score.
            CapacityError: more tokens than the cache holds.
        """
        row = self._calls.prompts.checked(ids)
        if not isinstance(start, int) or not 1 <= start < len(row):
            raise InputError(f"there is no token to score from {start!r} of {len(row)} on", fix="Give more tokens.")
        self._check_fits(len(row) - 1)
        parts = self._logits(row[:-1], start - 1)
        return TokenScores.joined(TokenScores.of(logits, row[at + 1 : at + 1 + len(logits)]) for at, logits in parts)

    def embed(self, texts: Any, *, pooling: Pooling = "mean", normalize: bool = False) -> NDArray[np.float32]:
        """A vector for a prompt of any kind, float32 [hidden]; of a list of them [N, hidden]. The bundle is one of --hidden-states.

        It is what the head is given, pooled over the prompt's own tokens; with `normalize` its length is 1.

        Raises:
            InputError: the prompt cannot be used, there is no such pooling, or the bundle gives no hidden states.
            CapacityError: more tokens than the cache holds.
            BundleError: the model computes NaN.
        """
        size = self.check_embeds()
        check_pooling(pooling)
        prompts, single = self._calls.prompts.read(texts, None, None)
        for ids in prompts:
            self._check_fits(len(ids))
        result = np.empty((len(prompts), size), np.float32)
        for vector, ids in zip(result, prompts, strict=True):
            vector[:] = pooled(self._hidden_states(ids), pooling, normalize)
        return result[0] if single else result

    def check_embeds(self) -> int:
        """The size of embeddings; InputError where the bundle or its engine gives none."""
        size = self.manifest.hidden_size
        if size is None or not self.backend.gives_hidden_states:
            raise InputError(
                "it gives no hidden states, and so no embeddings",
                where=self.bundle,
                fix="Export it with --hidden-states, and use ONNX Runtime.",
            )
        return size

    def _hidden_states(self, row: Ids) -> Iterator[NDArray[np.float32]]:
        """[s, hidden], part by part; others have their turns between them."""
        cache = self._scheduler.run(lambda: self.backend.new_cache(1, len(row)))
        for start in range(0, len(row), _PART):
            yield self._scheduler.run(partial(self.backend.hidden_states, cache, 0, row[start : start + _PART]))

    def _draft(self, text: Text, manifest: Manifest, backend: Backend[Any]) -> Draft:
        check_draft(self._text, self.backend.gives_all_logits, text)
        return Draft(backend, min(manifest.vocab_size, self.manifest.vocab_size))

    def _check_fits(self, length: int) -> None:
        over = length - self.capacity
        if over > 0:
            raise CapacityError(
                f"{length} tokens are {over} over the capacity of {self.capacity}",
                where=self.bundle,
                fix="Score them in parts, or export with a larger --capacity.",
            )

    def _logits(self, row: Ids, first: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Logits [s, V] after the tokens from `first` on, part by part, each with the place of its first."""
        cache = self._scheduler.run(lambda: self.backend.new_cache(1, len(row)))
        part = _PART if self.backend.gives_all_logits else _PART // 32
        self._scheduler.compute(cache, row[:first])
        for start in range(first, len(row), part):
            ids = row[start : start + part]
            yield start, self._scheduler.run(partial(self.backend.prefill, cache, 0, ids, all_logits=True))


def _config_ends(config: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer by the model's own configuration."""
    ends = config.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
