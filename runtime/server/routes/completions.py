"""POST /v1/completions."""

import asyncio
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response

from headfold.runtime.generate import Delta, Generation
from headfold.runtime.scheduling.request import TokenLogprob
from headfold.runtime.server.protocol.refusals import unsupported
from headfold.runtime.server.protocol.requests import CompletionRequest, are_several
from headfold.runtime.server.protocol.responses import Completion, CompletionChoice, CompletionLogprobs, JsonObject
from headfold.runtime.server.routes.answering import Call, unless_gone
from headfold.runtime.server.served import Models
from headfold.runtime.server.settings import Settings

_NEW_TOKENS = 16  # as OpenAI has it


async def complete(
    body: CompletionRequest, request: Request, models: Models, settings: Settings
) -> Completion | Response:
    """Texts that go on, whole or as they come."""
    served = models.find(body.model)
    if body.echo:
        raise unsupported("echo", "echo is not supported: put the prompt before the text yourself.")
    prompts = body.prompt if are_several(body.prompt) else [body.prompt]
    ids = await asyncio.to_thread(lambda: [served.model.encode(prompt) for prompt in prompts])
    left = served.model.capacity - max(map(len, ids))
    new_tokens = body.max_tokens or max(1, min(_NEW_TOKENS, settings.limits.new_tokens or _NEW_TOKENS, left))
    call = await Call.begin("cmpl", served, settings, body, ids, new_tokens, body.logprobs)
    return _stream(call, body) if body.stream else await unless_gone(request, _whole(call, body))


async def _whole(call: Call, body: CompletionRequest) -> Completion:
    choices = [_choice(call, body, index, answer) for index, answer in enumerate(await call.collect())]
    return Completion(**call.head, choices=choices, usage=call.usage())


def _stream(call: Call, body: CompletionRequest) -> Response:
    offsets = [0] * len(call.answers.requests)

    def choices(delta: Delta) -> Iterator[JsonObject]:
        if not delta.text and delta.logprob is None and delta.finish_reason is None:
            return
        logprobs = None
        if delta.logprob is not None:
            found = _logprobs(call, body, [delta.logprob], offsets[delta.index])
            offsets[delta.index] += len(found.tokens[0])
            logprobs = found.model_dump()
        yield {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    return call.stream("text_completion", [], choices)


def _choice(call: Call, body: CompletionRequest, index: int, answer: Generation) -> CompletionChoice:
    logprobs = None if body.logprobs is None else _logprobs(call, body, answer.logprobs or [])
    return CompletionChoice(index=index, text=answer.text, logprobs=logprobs, finish_reason=answer.finish_reason)


def _logprobs(call: Call, body: CompletionRequest, logprobs: list[TokenLogprob], offset: int = 0) -> CompletionLogprobs:
    return call.served.texts.completion(logprobs, body.logprobs or 0, offset)
