"""A conversation becomes the text that the model was trained on, by the bundle's template, within bounds of time and memory.

The template runs in `template_worker`, one process for all bundles and threads, started when the first template is read.
"""

import atexit
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from headfold.runtime.errors import BundleError, InputError
from headfold.runtime.templates import template_worker

Messages = Sequence[Mapping[str, Any]]
_LONGEST = 1 << 18  # characters of a template; the longest that we know has 30,000
_START_SECONDS = 60  # until the process is ready, on a busy machine
_ANSWER_BYTES = (
    12 * template_worker.OUTPUT_CHARACTERS + 1024
)  # JSON escapes an emoji in 12; and a little around the text
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing, by the names of different servers
_GIVEN = {"messages", "tools", "add_generation_prompt"}  # not as variables of the template's own
_FIX = "Give a plain prompt, or export with another template."


class ChatTemplate:
    """The templates of a bundle by name, one of which is often "tool_use", and the special tokens that they write.

    Raises:
        BundleError: a template is too long, or has an error of syntax.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], where: Path) -> None:
        self._templates, self._special, self._where = templates, special_tokens, where
        for source in templates.values():
            if len(source) > _LONGEST:
                raise BundleError(f"its chat template has over {_LONGEST:,} characters", where=where, fix=_FIX)
            try:
                template_worker.environment().parse(source)  # what it computes is not computed here, constants neither
            except (jinja2.TemplateError, RecursionError, ValueError) as error:
                raise BundleError(f"its chat template is broken: {error}", where=where, fix=_FIX) from error
        _worker.start()

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text; messages, tools and variables reach the template as plain JSON.

        Raises:
            InputError: messages or tools are malformed, or the template refuses them.
            BundleError: the template breaks a bound.
        """
        if not isinstance(messages, Sequence):
            raise InputError(f"messages cannot be a {type(messages).__name__}", fix="Give a list of them.")
        if not isinstance(tools, Sequence | None):
            raise InputError(f"tools cannot be a {type(tools).__name__}", fix="Give a list of functions.")
        if not isinstance(variables, Mapping):
            fix = 'Give a value for each name, as {"enable_thinking": False}.'
            raise InputError(f"template_variables cannot be a {type(variables).__name__}", fix=fix)
        if taken := sorted(_GIVEN & variables.keys()):
            raise InputError(f"template_variables names {taken[0]}, which is given otherwise", fix="Leave it out.")
        given = {
            "documents": None,  # as transformers passes them
            **self._special,
            **variables,
            "messages": [_message(index, message) for index, message in enumerate(messages)],
            "tools": None if tools is None else [_tool(index, tool) for index, tool in enumerate(tools)],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps({"template": self._source(tools is not None), "variables": _plain(given)})
        except RecursionError as error:
            raise InputError("the messages are nested too deeply", fix="Give plainer ones.") from error
        answer = _worker.ask(request.encode() + b"\n")
        if answer is None:
            bound = f"takes more than {template_worker.SECONDS} seconds, or all of its memory"
            raise BundleError(f"its chat template {bound}", where=self._where, fix=_FIX)
        if "bound" in answer:
            raise BundleError(f"its chat template {answer['bound']}", where=self._where, fix=_FIX)
        if "error" in answer:
            raise InputError(
                f"the chat template refuses the messages: {answer['error']}",
                where=self._where,
                fix="Correct the messages.",
            )
        return answer["text"]

    def _source(self, with_tools: bool) -> str:
        wanted = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if wanted not in self._templates:
            names = ", ".join(self._templates)
            raise InputError(f"the bundle has no default chat template, only {names}", where=self._where, fix=_FIX)
        return self._templates[wanted]


class _Worker:
    """The process that renders, and a lock so that one asks at a time. One that was killed is started anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def start(self) -> None:
        """Start the process if there is none, without waiting for it; if it cannot be started, `ask` will say so."""
        with self._lock, suppress(InputError):
            self._running()

    def ask(self, request: bytes) -> dict[str, str] | None:
        """What the process answers, or None if it had to be killed, or died."""
        with self._lock:
            process = self._running()
            try:
                if not self._ready and _exchange(process, b"", _START_SECONDS) != template_worker.READY:
                    raise InputError("Python cannot be started for the chat template", where=sys.executable, fix=_FIX)
                self._ready = True
                answer = _exchange(process, request, template_worker.SECONDS)
                if not answer.endswith(b"\n"):
                    self._end(process)
                    return None
                return dict(json.loads(answer))
            except BaseException:  # Ctrl-C too: its answer must not be the next one's
                self._end(process)
                raise

    def stop(self) -> None:
        """At the end of Python; who asks then gets no answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """After a fork, in the child: the process is the parent's, and its lock may be taken for ever."""
        self._lock, self._process, self._ready = threading.Lock(), None, False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        if self._process is None:
            self._ready = False
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            try:
                self._process = subprocess.Popen(
                    [sys.executable or "", "-P", "-m", template_worker.__name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path},
                )
            except OSError as error:
                what = f"Python cannot be started for the chat template: {error}"
                raise InputError(what, where=sys.executable, fix=_FIX) from error
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate()
        self._process = None


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Write a request and read a line, which is cut off if the process dies or does not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)  # and not select: a pipe of Windows has none
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline(_ANSWER_BYTES)
    except OSError:  # a broken pipe
        return b""
    finally:
        timer.cancel()


def _message(index: int, message: Any) -> dict[str, Any]:
    """A message as transformers 5 gives it to a template: no nulls, and reasoning by every name that templates read."""
    content = message.get("content") if isinstance(message, Mapping) else None
    wrong = not isinstance(message, Mapping) or not isinstance(message.get("role"), str)
    if wrong or not (_is_content(content) or (content is None and message["role"] == "assistant")):
        raise InputError(
            f"message {index} is malformed",
            fix='A message is {"role": "system", "user" or "assistant", "content": text}, or a list of parts as content.',
        )
    kept = {str(name): value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _is_content(content: Any) -> bool:
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    )


def _tool(index: int, tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        raise InputError(f"tool {index} is a {type(tool).__name__}", fix="A tool is a JSON schema of a function.")
    return tool


def _plain(value: Any) -> Any:
    """What JSON has, made of what callers give; as in transformers, anything else becomes its type's name."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case np.generic():
            return _plain(value.item())
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)  # of pydantic
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
