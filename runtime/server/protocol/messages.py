"""Messages and tools as chat templates have them."""

import json
from typing import Any

from headfold.runtime.server.protocol.requests import Message, Tool, ToolCall


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """As transformers' templates expect them: text in one piece, arguments of calls as objects, no `developer`."""
    return [_message(message) for message in messages]


def tools_for_template(tools: list[Tool]) -> list[dict[str, Any]]:
    """What was given, no more: templates print them whole."""
    return [tool.model_dump(exclude_unset=True) for tool in tools]


def _message(message: Message) -> dict[str, Any]:
    result = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    content = message.content
    result["role"] = "system" if message.role == "developer" else message.role
    if content is not None:
        result["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content)
    if message.tool_calls:
        result["tool_calls"] = [_call(call) for call in message.tool_calls]
        result.setdefault("content", "")  # templates add to it
    return result


def _call(call: ToolCall) -> dict[str, Any]:
    result = call.model_dump(exclude_unset=True) | {"type": call.type}
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return result
    if isinstance(arguments, dict):
        result["function"]["arguments"] = arguments
    return result
