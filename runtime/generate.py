"""A loaded bundle and what people do with it: generate, chat, score."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from headfold.runtime.errors import CapacityError, InputError
from headfold.runtime.manifest import Manifest
from headfold.runtime.sampling import Sampler, SamplingParameters
from headfold.runtime.session import OrtSession
from headfold.runtime.text import Detokenizer, Messages, Text, read_json

FinishReason = Literal["stop", "length"]
_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` has the end-of-sequence token if that ended it; `text` never has."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """What one step added to the answer number `index`; the last one of an answer has a finish reason."""

    index: int
    text: str
    token_id: int
    finish_reason: FinishReason | None


class Options(TypedDict, total=False):
    """Options of `Model.generate`."""

    max_new_tokens: int | None  # 256 by default, or what fits the cache
    temperature: float | None  # 0 is greedy; for this and the next four see SamplingParameters
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str]  # end before any of these texts
    seed: int | None  # makes sampling repeatable; a row draws the same whatever is beside it
    ignore_eos: bool  # go on after an end-of-sequence token


class Model:
    """A bundle, loaded. `session` is the onnxruntime.InferenceSession, for people who bring their own loop."""

    def __init__(self, bundle: Path, manifest: Manifest, backend: OrtSession) -> None:
        self.bundle, self.manifest, self.backend = bundle, manifest, backend
        self.session = backend.session
        self._text = Text(bundle)
        self._defaults = read_json(bundle / "generation_config.json")
        eos = self._defaults.get("eos_token_id")
        self.eos_token_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; InputError if it has none."""
        return self._text.tokenizer

    def chat_prompt(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the bundle's chat template; InputError if it has none or refuses."""
        return self._text.chat_prompt(messages, add_generation_prompt)

    @overload
    def generate(self, prompt: Any, *, stream: Literal[True], **options: Unpack[Options]) -> Iterator[Delta]: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Generation: ...
    @overload
    def generate(self, prompt: Any, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Any: ...

    def generate(self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """Continue a prompt (text or token ids), answer messages, or do so for a list of them, of any lengths.

        What is not given comes from the bundle's generation_config.json, and is greedy if that does not sample.

        Args:
            prompt: text; token ids; messages `[{"role": ..., "content": ...}]`; or a list of these, which gives a list.
            stream: return an iterator of Deltas; otherwise a Generation, or a list of them for a list of prompts.
            options: see `Options`.

        Raises:
            InputError: an empty prompt, a token that does not exist, or a parameter out of range.
            CapacityError: prompt and answer do not fit the bundle's cache.
        """
        prompts, single = self._prompts(prompt)
        deltas = self._deltas(prompts, **options)
        if stream:
            return deltas
        texts: list[list[str]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        for delta in deltas:
            texts[delta.index].append(delta.text)
            tokens[delta.index].append(delta.token_id)
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        rows = zip(map("".join, texts), tokens, reasons, map(len, prompts), strict=True)
        results = [Generation(*row) for row in rows]
        return results[0] if single else results

    def _deltas(
        self,
        prompts: list[NDArray[np.int64]],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """Check everything now; generate when iterated."""
        parameters = self._parameters(sampling, seed)
        budget = self._budget(prompts, max_new_tokens)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if stops:
            _ = self.tokenizer  # stop strings need one
        return self._stream(prompts, parameters, budget, stops, ignore_eos)

    def _stream(
        self,
        prompts: list[NDArray[np.int64]],
        parameters: SamplingParameters,
        budget: int,
        stop: list[str],
        ignore_eos: bool,
    ) -> Iterator[Delta]:
        batch, vocab = len(prompts), self.manifest.vocab_size
        cache = self.backend.new_cache(batch, max(map(len, prompts)) + budget)
        samplers = [Sampler(parameters, vocab, prompt, row) for row, prompt in enumerate(prompts)]
        has_text = self._text._tokenizer is not None
        writers = [Detokenizer(self.tokenizer, stop) for _ in prompts] if has_text else None
        logits = np.empty((batch, vocab), np.float32)
        for row, prompt in enumerate(prompts):
            result = self.backend.prefill(cache, row, prompt)
            logits[row] = result if result.ndim == 1 else result[-1]
        active = np.ones(batch, np.bool_)
        tokens = np.zeros(batch, np.int64)
        for step in range(budget):
            for row in map(int, np.flatnonzero(active)):
                token = samplers[row](logits[row])
                tokens[row] = token
                ended = token in self.eos_token_ids and not ignore_eos
                text = writers[row].push(None if ended else token) if writers else ""
                reason: FinishReason | None = "stop" if ended or (writers and writers[row].stopped) else None
                if reason is None and step == budget - 1:
                    reason = "length"
                    text += writers[row].push(None) if writers else ""
                active[row] = reason is None
                yield Delta(row, text, token, reason)
            if not active.any():
                return
            logits = self.backend.decode(cache, tokens, active)

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Next-token logits after every token, for scoring: `ids` [S] or [B, S] gives [S, vocab] or [B, S, vocab].

        A bundle exported with --all-logits computes them in one pass; any other one takes as many steps as there are tokens.

        Raises:
            InputError: no tokens, or one that does not exist.
            CapacityError: more tokens than the cache holds.
        """
        array = np.asarray(ids)
        if array.ndim not in (1, 2) or array.size == 0:
            raise InputError(f"token ids have the shape {list(array.shape)}", fix="Give [S] or [B, S], not empty.")
        rows = [self._ids(row) for row in np.atleast_2d(array)]
        self._budget(rows, 0)
        cache = self.backend.new_cache(len(rows), array.shape[-1])
        if self.manifest.logits == "all":
            result = np.stack([self.backend.prefill(cache, row, tokens) for row, tokens in enumerate(rows)])
        else:
            active = np.ones(len(rows), np.bool_)
            steps = [self.backend.decode(cache, column, active) for column in np.stack(rows, 1)]  # S times [B, V]
            result = np.stack(steps, 1)
        return result[0] if array.ndim == 1 else result

    def _prompts(self, prompt: Any) -> tuple[list[NDArray[np.int64]], bool]:
        """Token ids of each prompt, and whether there was only one, not in a list."""
        if _is_one(prompt):
            return [self._encode(prompt)], True
        if not isinstance(prompt, Sequence) or not len(prompt) or not all(map(_is_one, prompt)):
            raise InputError(
                "that is no prompt" if prompt else "the prompt is empty",
                fix="Give text, token ids, messages, or a list of them.",
            )
        return [self._encode(one) for one in prompt], False

    def _encode(self, prompt: Any) -> NDArray[np.int64]:
        if isinstance(prompt, str):
            return self._ids(self._text.encode(prompt))
        if isinstance(prompt[0], Mapping):
            return self._ids(self._text.encode_chat(prompt))
        return self._ids(prompt)

    def _ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(ids)
        if array.size == 0:
            raise InputError("the prompt is empty", fix="Give at least one token.")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError("token ids are not integers", fix="Give a list of integers.")
        if array.min() < 0 or array.max() >= self.manifest.vocab_size:
            low, high = int(array.min()), int(array.max())
            bad = low if low < 0 else high
            raise InputError(
                f"token {bad} is not in the vocabulary", fix=f"Token ids are 0 to {self.manifest.vocab_size - 1}."
            )
        return array.astype(np.int64)

    def _budget(self, prompts: list[NDArray[np.int64]], asked: int | None) -> int:
        """How many tokens to generate at most."""
        capacity, longest = self.manifest.cache.capacity, max(map(len, prompts))
        room = capacity - longest
        if asked is None and room > 0:
            return min(_DEFAULT_NEW_TOKENS, room)
        if asked is not None and asked < 0:
            raise InputError(f"max_new_tokens is {asked}", fix="It must be 0 or more.")
        if room < (asked if asked is not None else 1):
            wanted = f" and {asked} new ones" if asked else ""
            raise CapacityError(
                f"a prompt of {longest} tokens{wanted} is {longest + (asked or 0) - capacity or 1} over the capacity of {capacity}",
                where=self.bundle,
                fix="Shorten it, ask for fewer tokens, or export with a larger --capacity.",
            )
        return asked or 0

    def _parameters(self, given: dict[str, Any], seed: int | None) -> SamplingParameters:
        """Explicit values first, then the bundle's if it samples, else greedy."""
        explicit = {name: value for name, value in given.items() if value is not None}
        defaults: dict[str, Any] = {}
        if self._defaults.get("do_sample") and "temperature" not in explicit:
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            defaults = {"temperature": 1.0} | {n: self._defaults[n] for n in names if self._defaults.get(n) is not None}
        return SamplingParameters(**defaults | explicit, seed=seed)


def _is_one(prompt: Any) -> bool:
    """Whether it is one prompt, not a list of them."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence | np.ndarray) or not len(prompt):
        return isinstance(prompt, np.ndarray)
    return isinstance(prompt[0], int | np.integer | Mapping)
