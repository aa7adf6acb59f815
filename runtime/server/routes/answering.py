"""What chats and completions share: a call begun, its answers collected or streamed, and let go of once the client is gone."""

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from headfold.runtime.generate import Delta, Generation
from headfold.runtime.scheduling.answers import AsyncAnswers
from headfold.runtime.scheduling.request import Ids
from headfold.runtime.server.protocol.refusals import Refused, refusal_of
from headfold.runtime.server.protocol.requests import Generating
from headfold.runtime.server.protocol.responses import CachedTokens, JsonObject, Usage
from headfold.runtime.server.served import Served
from headfold.runtime.server.settings import Settings

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_OTHERS = ("stop", "seed")
_Result = TypeVar("_Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Call:
    """One request's answers while they come."""

    def __init__(
        self, kind: str, served: Served, body: Generating, answers: AsyncAnswers, count: int, announces: bool
    ) -> None:
        """`count` answers of each prompt; `announces`: see Settings."""
        self.served, self.body, self.answers, self.count = served, body, answers, count
        self._announces = announces
        self.id, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())
        self._new_tokens = 0
        self._meter = served.meters.call(served.name, len(answers.requests))

    @classmethod
    async def begin(
        cls,
        kind: str,
        served: Served,
        settings: Settings,
        body: Generating,
        prompts: list[Ids],
        new_tokens: int | None,
        top_logprobs: int | None,
        json_schema: JsonObject | None = None,
    ) -> "Call":
        """Check it all, and queue it. `new_tokens` is what the client asks for. Raises Refused, or the runtime's own errors."""
        limits, count = settings.limits, body.n or 1
        if len(prompts) * count > limits.answers:
            raise Refused(400, f"{len(prompts) * count} answers are more than {limits.answers} at once.", param="n")
        most = limits.new_tokens or served.model.capacity
        if new_tokens is not None and new_tokens > most:
            raise Refused(
                400, f"{new_tokens} new tokens are more than the {most} that may be asked for.", param="max_tokens"
            )
        options = {name: getattr(body, name) for name in (*_SAMPLING, *_OTHERS)}
        answers = await served.model.agenerate(
            prompts,
            stream=True,
            max_new_tokens=new_tokens,
            n=count,
            logit_bias=_biases(body.logit_bias),
            ignore_eos=bool(body.ignore_eos),
            top_logprobs=top_logprobs,
            json_schema=json_schema,
            timeout=limits.seconds,
            reuse=settings.reuse,
            **options,
        )
        return cls(kind, served, body, answers, count, settings.announces)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Those of all answers, as they come."""
        end = "cancelled"
        try:
            async for delta in self.answers:
                self._new_tokens += 1
                self._meter.see(delta)
                yield delta
        except Exception:
            end = "error"
            raise
        finally:
            self._meter.over(end)

    async def collect(self) -> list[Generation]:
        """All answers, complete. Raises Refused."""
        async with self.answers:
            try:
                return self.answers.generations([delta async for delta in self.deltas()])
            except Exception as error:
                raise refusal_of(error, began=True) from error

    def usage(self) -> Usage:
        """What there is of it by now; a prompt counts once, however many answers it has."""
        firsts = self.answers.requests[:: self.count]
        prompt, new = sum(len(request.ids) for request in firsts), self._new_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(request.cached_tokens for request in firsts)),
        )

    @property
    def head(self) -> JsonObject:
        """The first fields of every answer and chunk."""
        return {"id": self.id, "created": self.created, "model": self.served.name}

    def stream(
        self, kind: str, opening: list[JsonObject], choices: Callable[[Delta], Iterable[JsonObject]]
    ) -> "Events":
        """Server-sent events: `opening` choices, then those that deltas make, each in a chunk that is called `kind`."""
        wants_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self.head | {"object": kind}

        def chunk(choice: JsonObject) -> bytes:
            return event(head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

        async def events() -> AsyncIterator[bytes]:
            due = deque(opening)
            while due and self._announces:
                yield chunk(due.popleft())
            try:
                async for delta in self.deltas():
                    due.extend(choices(delta))
                    while due:
                        yield chunk(due.popleft())
            except (
                Exception
            ) as error:  # 200 was said: the error is an event of its own, and the stream ends without [DONE]
                yield event(refusal_of(error, began=True).body())
                return
            if wants_usage:
                yield event(head | {"choices": [], "usage": self.usage().model_dump()})
            yield b"data: [DONE]\n\n"

        return Events(events(), self.answers)


class Events(StreamingResponse):
    """A stream that lets go of its answers when it ends, however it does."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answers: AsyncAnswers) -> None:
        super().__init__(
            events, headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )  # nginx would hold it back
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        async with self._answers:
            await super().__call__(scope, receive, send)


def event(content: BaseModel | JsonObject) -> bytes:
    """A server-sent event; in ASCII, for tokenizers may decode to what has no UTF-8."""
    plain = content.model_dump() if isinstance(content, BaseModel) else content
    return f"data: {json.dumps(plain, separators=(',', ':'))}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of work, which is cancelled if the client goes away before. Raises ClientGone then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in tasks:
            one.cancel()
        with suppress(asyncio.CancelledError):
            await watch


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """By token."""
    try:
        return None if given is None else {int(token): value for token, value in given.items()}
    except ValueError as error:
        raise Refused(400, "The keys of logit_bias are token ids.", param="logit_bias") from error
