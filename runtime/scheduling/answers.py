"""A caller's end of its requests: deltas as they come, in a loop or in asyncio's. Letting go of either cancels what is unfinished."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from headfold.runtime.scheduling.request import Deliver, Delta, FinishReason, Request, TokenLogprob


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` has the end-of-sequence token, or the stop string's tokens, if that ended it; `text` never has.

    `cached_tokens` of the prompt were in the cache already; `logprobs` has an entry for each of `token_ids`, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None


class _Answers:
    """What both kinds share. `owner` is kept alive as long as this is."""

    def __init__(self, requests: list[Request], owner: object) -> None:
        self.requests, self._owner, self._unfinished = requests, owner, len(requests)

    def close(self) -> None:
        """Cancel what is unfinished."""
        self._unfinished = 0
        for request in self.requests:
            request.cancelled = True

    def __del__(self) -> None:
        self.close()

    def _see(self, event: Delta | Exception) -> Delta:
        if isinstance(event, Exception):
            self.close()
            raise event
        self._unfinished -= event.finish_reason is not None
        return event

    def generations(self, deltas: Iterable[Delta]) -> list[Generation]:
        """The answers that all deltas make."""
        own: list[list[Delta]] = [[] for _ in self.requests]
        for delta in deltas:
            own[delta.index].append(delta)
        return [_joined(request, answer) for request, answer in zip(self.requests, own, strict=True)]


class Answers(_Answers, Iterator[Delta]):
    """Deltas of all answers of a call, as they come."""

    def __init__(self, requests: list[Request], events: "queue.SimpleQueue[Delta | Exception]", owner: object) -> None:
        super().__init__(requests, owner)
        self._events = events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Delta:
        if not self._unfinished:
            raise StopIteration
        return self._see(self._events.get())


class AsyncAnswers(_Answers, AsyncIterator[Delta]):
    """The same in an event loop."""

    def __init__(self, requests: list[Request], events: "asyncio.Queue[Delta | Exception]", owner: object) -> None:
        super().__init__(requests, owner)
        self._events = events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def __anext__(self) -> Delta:
        if not self._unfinished:
            raise StopAsyncIteration
        return self._see(await self._events.get())


def deliver_here(events: "queue.SimpleQueue[Delta | Exception]") -> Deliver:
    """To a thread."""
    return lambda request, event: events.put(event)


def deliver_in_loop(events: "asyncio.Queue[Delta | Exception]", loop: asyncio.AbstractEventLoop) -> Deliver:
    """To an event loop; one that is closed by now wants no more."""

    def deliver(request: Request, event: Delta | Exception) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # it is closed
            request.cancelled = True

    return deliver


def _joined(request: Request, answer: list[Delta]) -> Generation:
    logprobs = [delta.logprob for delta in answer if delta.logprob is not None]
    return Generation(
        text="".join(delta.text for delta in answer),
        token_ids=[delta.token_id for delta in answer],
        finish_reason=answer[-1].finish_reason or "length",
        prompt_tokens=len(request.ids),
        cached_tokens=request.cached_tokens,
        logprobs=logprobs or None,
    )
