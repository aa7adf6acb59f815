"""Servers on a port of this machine, in a thread of the test's process, and OpenAI's own client to ask them."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import uvicorn

from headfold.runtime import Model
from headfold.runtime.server.app import make_app
from headfold.runtime.server.settings import Settings


@contextmanager
def serving(models: dict[str, Model], settings: Settings | None = None) -> Iterator[str]:
    """The address of a server with these models."""
    app = make_app(models, settings or Settings())
    server = uvicorn.Server(uvicorn.Config(app, http="h11", loop="asyncio", log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def client_of(address: str, key: str = "-") -> openai.OpenAI:
    """Asks once, and waits a minute at most."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)
