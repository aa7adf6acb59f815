"""What stands before the routes: who may ask, under which name, and how much may be sent. ASGI middlewares."""

import asyncio
import hmac
from urllib.parse import urlsplit

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headfold.runtime.server.protocol.refusals import Refused, refusal_of
from headfold.runtime.server.settings import Settings

_OPEN = ("/healthz", "/readyz", "/", "/docs", "/openapi.json")  # of nobody's data; what is below /static/, too


class Guards:
    """All of them, for the application `app`; `requests` counts what becomes of each."""

    def __init__(self, app: ASGIApp, settings: Settings, requests: Counter) -> None:
        self._app, self._settings, self._requests = app, settings, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                route = getattr(
                    scope.get("route"), "path", "none"
                )  # nobody makes series by asking for what is not there
                self._requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, await self._read(scope, receive), counted)
        except Exception as error:  # what no route refuses is a bug of ours, and counted, too
            if began:
                raise
            await refusal_of(error).response()(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        hosts, key = self._settings.hosts, self._settings.key
        host = (_header(scope, b"host") or b"").decode("latin-1")
        if hosts is not None and _name(host) not in hosts:
            # A page of any site can have its own name lead to this machine, and would then be let in as a friend.
            raise Refused(
                421, "This server is not asked by that name. Start it with --api-key to have it answer to others."
            )
        if key is None or scope["path"] in _OPEN or scope["path"].startswith("/static/"):
            return
        kind, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
        if not hmac.compare_digest(given.strip(), key.encode()) or kind.lower() != b"bearer":
            raise Refused(401, "Incorrect API key. Send it as: Authorization: Bearer KEY.", code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """All of the body, within its limits; what gives it out again, then what comes after it: that the client is gone."""
        limits, body = self._settings.limits, bytearray()
        too_large = Refused(413, f"The body is over {limits.body_bytes} bytes.", code="request_too_large")
        length = _header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _then(message, receive)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limits.body_bytes:
                        raise too_large
        except TimeoutError as error:
            raise Refused(408, f"The body did not come within {limits.body_seconds:g} seconds.") from error
        return _then({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _then(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _name(host: str) -> str:
    """The host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
