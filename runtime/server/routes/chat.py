"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec

from starlette.requests import Request
from starlette.responses import Response

from headfold.runtime.generate import Delta, Generation
from headfold.runtime.scheduling.request import TokenLogprob
from headfold.runtime.server.protocol.messages import for_template, tools_for_template
from headfold.runtime.server.protocol.refusals import Refused, unsupported
from headfold.runtime.server.protocol.requests import ChatRequest
from headfold.runtime.server.protocol.responses import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    JsonObject,
)
from headfold.runtime.server.protocol.responses import Call as ToolCall
from headfold.runtime.server.protocol.tool_calls import ToolCallReader
from headfold.runtime.server.routes.answering import Call, unless_gone
from headfold.runtime.server.served import Models, Served
from headfold.runtime.server.settings import Settings


async def chat(body: ChatRequest, request: Request, models: Models, settings: Settings) -> ChatCompletion | Response:
    """The answer to a conversation, whole or as it comes."""
    served = models.find(body.model)
    _check(body)
    tools = tools_for_template(body.tools) if body.tools and body.tool_choice != "none" else None
    ids = await asyncio.to_thread(served.model.encode, for_template(body.messages), tools, body.chat_template_kwargs)
    top = (body.top_logprobs or 0) if body.logprobs else None
    new_tokens = _new_tokens(body, served, settings, len(ids))
    calls = tools is not None and await served.writes_calls()
    schema = None if body.response_format is None else body.response_format.schema_asked
    call = await Call.begin("chatcmpl", served, settings, body, [ids], new_tokens, top, schema)
    return _stream(call, calls) if body.stream else await unless_gone(request, _whole(call, calls))


def _check(body: ChatRequest) -> None:
    formed = body.response_format
    if formed is not None and (formed.type == "json_schema") != (formed.json_schema is not None):
        raise Refused(400, "json_schema is for the type of its name.", param="response_format")
    if formed is not None and formed.type != "text":
        if find_spec("llguidance") is None:
            raise unsupported("response_format", "This server has no llguidance: install headfold[grammar] beside it.")
        if body.tools and body.tool_choice != "none":
            raise unsupported("response_format", "An answer of a prescribed form can call no tools.")
    if body.tool_choice is not None and not isinstance(body.tool_choice, str):
        raise unsupported("tool_choice", "A function cannot be forced: tool_choice is none or auto.")
    if body.tool_choice == "required":
        raise unsupported("tool_choice", "A call cannot be forced: tool_choice is none or auto.")
    if body.tool_choice is not None and not body.tools:
        raise Refused(400, "tool_choice is for requests with tools.", param="tool_choice")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused(400, "top_logprobs is for requests with logprobs.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refused(400, "max_tokens is the older name of max_completion_tokens: give one.", param="max_tokens")


def _new_tokens(body: ChatRequest, served: Served, settings: Settings, length: int) -> int:
    """What is asked for; by default what fits. Where nothing does, one, for `generate` to refuse."""
    asked = body.max_completion_tokens or body.max_tokens
    fits = max(1, served.model.capacity - length)
    return asked or min(fits, settings.limits.new_tokens or fits)


async def _whole(call: Call, calls: bool) -> ChatCompletion:
    choices = [_choice(call, index, answer, calls) for index, answer in enumerate(await call.collect())]
    return ChatCompletion(**call.head, choices=choices, usage=call.usage())


def _choice(call: Call, index: int, answer: Generation, calls: bool) -> ChatChoice:
    found = ToolCallReader().push(answer.text, end=True) if calls else [answer.text]
    made = [one for one in found if isinstance(one, ToolCall)]
    text = "".join(one for one in found if isinstance(one, str))
    message = AnswerMessage(content=text if text or not made else None, tool_calls=made or None)
    reason = "tool_calls" if made and answer.finish_reason == "stop" else answer.finish_reason
    logprobs = None if answer.logprobs is None else call.served.texts.chat(answer.logprobs)
    return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason)


def _stream(call: Call, calls: bool) -> Response:
    count = len(call.answers.requests)
    readers = [ToolCallReader() for _ in range(count)] if calls else None

    def choices(delta: Delta) -> Iterator[JsonObject]:
        last, logprobs = delta.finish_reason is not None, _logprobs(call, delta.logprob)
        reader = readers[delta.index] if readers else None
        begun = reader.calls if reader else 0
        for one in reader.push(delta.text, end=last) if reader else filter(None, [delta.text]):
            content: JsonObject = {"content": one}
            if isinstance(one, ToolCall):
                content, begun = {"tool_calls": [{"index": begun, **one.model_dump()}]}, begun + 1
            yield _chunk(delta.index, content, logprobs)
            logprobs = None
        if logprobs is not None:
            yield _chunk(delta.index, {"content": ""}, logprobs)
        if last:
            made = delta.finish_reason == "stop" and begun
            yield _chunk(delta.index, {}, None, "tool_calls" if made else delta.finish_reason)

    opening = [_chunk(index, {"role": "assistant", "content": ""}) for index in range(count)]
    return call.stream("chat.completion.chunk", opening, choices)


def _chunk(
    index: int, delta: JsonObject, logprobs: ChatLogprobs | None = None, reason: str | None = None
) -> JsonObject:
    told = None if logprobs is None else logprobs.model_dump()
    return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}


def _logprobs(call: Call, logprob: TokenLogprob | None) -> ChatLogprobs | None:
    return None if logprob is None else call.served.texts.chat([logprob])
