"""The server as a process: it listens, says so, and on SIGTERM or SIGINT answers what it has before it ends."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from headfold.runtime.errors import InputError

_LAST_WORDS = 5  # seconds for clients to be told that their answer ends


class _Server(uvicorn.Server):
    """Ends well after a signal: uvicorn's own would send itself the signal once more, and be killed by it; and it cuts streams off."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: int, close: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._drain_seconds, self._close = app, drain_seconds, close

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn.Server."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one ends at once."""
        self._app.state.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server. An answer that is not complete in time ends with an error, which its client is told."""
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self._drain_seconds, loop.run_in_executor, None, self._close)
        await super().shutdown(sockets)
        deadline.cancel()
        if self.force_exit and (tasks := set(self.server_state.tasks)):
            await loop.run_in_executor(None, self._close)
            await asyncio.wait(tasks, timeout=_LAST_WORDS)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; of port 0, the system chooses.

    Raises:
        InputError: the address is not this machine's, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise InputError(
            f"cannot listen: {error}", where=f"{host} port {port}", fix="Choose another --host or --port."
        ) from error
    opened.set_inheritable(True)
    return opened


def run(
    app: FastAPI, opened: socket.socket, drain_seconds: int, started: Callable[[], Any], close: Callable[[], None]
) -> None:
    """Serve until a signal; then at most so many seconds for the answers that are on their way, and `close` ends them.

    `started` is called once it listens.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # whatever else is installed: what was tested is what runs
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds + _LAST_WORDS,
        lifespan="off",
    )
    logging.basicConfig(stream=sys.stderr, format="headfold: %(message)s")
    opened.listen(config.backlog)
    started()
    _Server(config, app, drain_seconds, close).run(sockets=[opened])
