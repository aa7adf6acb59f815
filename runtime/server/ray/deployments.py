"""The two deployments: an ingress that passes requests on, and the model's server, whose replicas answer them.

A replica that ends takes with it what it was answering, and nothing else: as long as nothing of an answer was sent, another
replica is asked for it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headfold.runtime import load
from headfold.runtime.server.app import make_app, tell_errors
from headfold.runtime.server.guards import Guards
from headfold.runtime.server.metrics import CONTENT_TYPE
from headfold.runtime.server.protocol.refusals import Refused
from headfold.runtime.server.protocol.responses import Health
from headfold.runtime.server.ray.merging import merged
from headfold.runtime.server.ray.routing import beginnings
from headfold.runtime.server.routes.answering import event, unless_gone
from headfold.runtime.server.settings import Settings

_ATTEMPTS = 3  # replicas that one request may be given to: what ends them all is the request
_METRICS_SECONDS = 10
_TARGET = ("scheme", "method", "path", "raw_path", "root_path", "query_string")
_PASSED_ON = ("type", "asgi", "http_version", *_TARGET, "headers", "client", "server")  # of ASGI's scope
REPLICA = "x-headfold-replica"  # header: who answers


class ModelServer:
    """A bundle, loaded, behind the application of `headfold serve`."""

    def __init__(self, bundle: Path, name: str, settings: Settings, **options: Any) -> None:
        """`options`: see headfold.runtime.load."""
        self._id = serve.get_replica_context().replica_id.unique_id
        self._app = make_app({name: load(bundle, **options)}, settings)

    async def answer(self, scope: dict[str, Any], body: bytes, prompt: Sequence[bytes]) -> AsyncIterator[Message]:
        """ASGI's messages of the answer to a request; `prompt` is the router's."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return received.pop() if received else await asyncio.Future()  # it is cancelled once the client is gone

        task = asyncio.create_task(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA.encode(), self._id.encode())]
                yield message
            await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def metrics(self) -> tuple[str, str]:
        """Which replica it is, and what it tells Prometheus."""
        return self._id, self._app.state.meters.text().decode()


class Ingress:
    """Who may ask, with how much, is decided here; then a replica answers."""

    def __init__(self, servers: DeploymentHandle[ModelServer], settings: Settings) -> None:
        self._servers, self._settings = servers.options(stream=True), settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """See ray.serve.ingress."""
        registry = CollectorRegistry()
        labels = ["route", "status"]
        requests = Counter("headfold_ingress_requests", "By route of the ingress.", labels, registry=registry)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(Guards, settings=self._settings, requests=requests)
        tell_errors(app)

        @app.get("/healthz")
        async def alive() -> Health:
            return Health(status="ok")  # of replicas, Ray looks after itself

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> Response:
            asked = self._servers.broadcast("metrics")
            try:
                told = await asked.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
            except DeploymentUnavailableError:  # there is no replica now
                told = []
            except TimeoutError as error:
                raise Refused(504, "A replica does not tell its metrics.") from error
            texts = dict(one for one in told if not isinstance(one, RayActorError))  # who has ended has none
            return Response(merged(texts, registry), media_type=CONTENT_TYPE)

        app.mount("/", self._pass_on)
        return app

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To a replica; to another one if that ends before it has sent anything."""
        first = await receive()  # the guards have all of the body
        if scope["type"] == "http" and first["type"] == "http.request":
            await unless_gone(Request(scope, receive), self._ask(scope, first["body"], send))

    async def _ask(self, scope: Scope, body: bytes, send: Send) -> None:
        passed = {name: scope[name] for name in _PASSED_ON if name in scope}
        prompt = beginnings(body) if scope["method"] == "POST" else ()
        for _ in range(_ATTEMPTS):
            answer = _Answer(send, self._settings.limits.seconds)
            try:
                return await answer.send_all(self._servers.answer.remote(passed, body, prompt=prompt))
            except RayActorError:
                if answer.began:
                    return await answer.break_off()
            except BackPressureError as error:
                raise Refused(429, "Too many requests wait: try again.", code="queue_full") from error
            except DeploymentUnavailableError as error:
                raise Refused(503, "The model could not be loaded.") from error
            except TimeoutError as error:
                raise Refused(504, "No replica answered in time.", code="deadline_exceeded") from error
        raise Refused(503, f"{_ATTEMPTS} replicas ended while they had this request.")


class _Answer:
    """What a replica says, on its way to the client; HTTP's head waits for the first piece of the body, for it cannot be taken back."""

    def __init__(self, send: Send, seconds: float) -> None:
        """The first piece comes within so many seconds; how long the others may take, the replica knows."""
        self.began = False
        self._send, self._seconds, self._streams, self._complete = send, seconds, False, False

    async def send_all(self, messages: DeploymentResponseGenerator) -> None:
        """Raises RayActorError: the replica ended before that, `began` or not."""
        head: Message | None = None
        try:
            async with asyncio.timeout(self._seconds) as limit:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        head, self._streams = message, _is_stream(message)
                        continue
                    if head is not None:
                        limit.reschedule(None)
                        self.began = True
                        await self._send(head)
                        head = None
                    await self._send(message)
                    self._complete = not message.get("more_body", False)
        finally:
            messages.cancel()  # of what is over, this is nothing

    async def break_off(self) -> None:
        """The replica ended. A stream's client is told; whoever waits for a length of bytes sees that they do not come."""
        if self._complete:
            return
        if not self._streams:
            raise Refused(503, "The replica that answered has ended.")
        error = event(Refused(503, "The replica that answered has ended: ask again.").body())
        await self._send({"type": "http.response.body", "body": error, "more_body": False})


def _is_stream(head: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head["headers"])
