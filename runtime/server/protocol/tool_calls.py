"""Calls in an answer's text, in the form of Hermes, Qwen and their kin: <tool_call>{"name": …, "arguments": {…}}</tool_call>.

Source: NousResearch, Hermes-Function-Calling, README. What is not exactly that stays text.
"""

import json
import uuid

from headfold.runtime.server.protocol.responses import Call, Called
from headfold.runtime.text import begun

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCallReader:
    """Takes an answer's text as it comes; gives what is text for certain, and calls once they are complete.

    Space around a call is the call's.
    """

    def __init__(self) -> None:
        self._held = ""  # what may be, or become, a call, and the space before it
        self._after = False  # a call, and only space since
        self.calls = 0

    def push(self, text: str, end: bool = False) -> list[str | Call]:
        """What is certain by now, in order; `end`: no more text comes."""
        self._held += text
        found: list[str | Call] = []
        while (start := self._held.find(OPEN)) >= 0:
            close = _close(self._held, start + len(OPEN))
            if close < 0 and not end:
                break
            inner = self._held[start + len(OPEN) : close if close >= 0 else None]
            rest = self._held[close + len(CLOSE) :] if close >= 0 else ""
            call = read_call(inner)
            if call is None:
                self._say(found, self._held[: len(self._held) - len(rest)])
            else:
                self._say(found, self._held[:start].rstrip())
                found.append(call)
                self.calls, self._after = self.calls + 1, True
            self._held = rest
        certain = len(self._held) if end else len(self._held[: _begin(self._held)].rstrip())
        self._say(found, self._held[:certain])
        self._held = self._held[certain:]
        return found

    def _say(self, found: list[str | Call], text: str) -> None:
        text = text.lstrip() if self._after else text
        if text:
            self._after = False
            found.append(text)


def _begin(text: str) -> int:
    """Where a call begins, or may begin once more text comes."""
    return text.index(OPEN) if OPEN in text else len(text) - begun(OPEN, text)


def _close(text: str, start: int) -> int:
    """Where a call ends that begins there; -1: not yet. What stands in its strings does not end it."""
    close = text.find(CLOSE, start)
    while close >= 0:
        try:
            json.loads(text[start:close])
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                close = text.find(CLOSE, close + 1)
                continue
        except (ValueError, RecursionError):
            pass  # no call: see `read_call`
        return close
    return close


def read_call(text: str) -> Call | None:
    """A call, if the text is one, and all of it is JSON, as NaN is not, and has UTF-8."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            written = json.dumps(arguments, ensure_ascii=False)
            written = written if _has_utf8(written) else json.dumps(arguments)
        case {"name": str(name), "arguments": str(written)}:  # some models write JSON in JSON
            pass
        case {"name": str(name)} if "arguments" not in value:
            written = "{}"
        case _:
            return None
    if not _has_utf8(name + written):
        return None
    return Call(id=f"call_{uuid.uuid4().hex[:24]}", function=Called(name=name, arguments=written))


def _has_utf8(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
