"""Debian's Chromium without a window, over its debugging pipe: a page is opened at a width, keys are pressed, what it says is kept."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
]
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


class Page:
    """One page; `complaints` are what the console has of warnings, errors and failed requests."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._held, self._id = read, write, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol; its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def open(self, address: str, width: int, height: int = 800) -> None:
        """At a width in pixels; a narrow one is a phone's."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What JavaScript makes of it."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until it is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """A key by its name."""
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        own = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if own else "rawKeyDown", **facts, **own)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def screenshot(self, path: Path) -> None:
        """As it is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> Any:
        while b"\0" not in self._held:
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium is gone"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def _note(self, message: Any) -> None:
        match message:
            case {
                "method": "Runtime.consoleAPICalled",
                "params": {"type": "warning" | "error" | "assert", "args": said},
            }:
                self.complaints.append(str(said))
            case {"method": "Runtime.exceptionThrown", "params": thrown}:
                self.complaints.append(str(thrown))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "warning" | "error"} as entry}}:
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser of its own, ended with the test."""
    (read_there, write), (read, write_there) = os.pipe(), os.pipe()

    def arrange() -> None:  # the protocol's pipe is 3 in and 4 out
        there = os.dup(read_there), os.dup(write_there)
        moved = tuple(os.dup2(one, 50 + place) for place, one in enumerate(there))
        os.dup2(moved[0], 3)
        os.dup2(moved[1], 4)

    command = ["chromium", *FLAGS, f"--user-data-dir={profile}"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, preexec_fn=arrange, close_fds=False) as process:
        os.close(read_there)
        os.close(write_there)
        try:
            yield Page(read, write)
        finally:
            process.kill()
            os.close(read)
            os.close(write)
