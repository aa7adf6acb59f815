"""The application: routes, and what becomes of errors. Made of loaded models; closes none."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from headfold.runtime.errors import HeadfoldError
from headfold.runtime.generate import Model
from headfold.runtime.server.guards import Guards
from headfold.runtime.server.metrics import CONTENT_TYPE
from headfold.runtime.server.pages import add_pages
from headfold.runtime.server.protocol.refusals import Refused, invalid, refusal_of
from headfold.runtime.server.protocol.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from headfold.runtime.server.protocol.responses import (
    ChatCompletion,
    Completion,
    EmbeddingList,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)
from headfold.runtime.server.routes.answering import ClientGone
from headfold.runtime.server.routes.chat import chat
from headfold.runtime.server.routes.completions import complete
from headfold.runtime.server.routes.embeddings import embed
from headfold.runtime.server.served import Models
from headfold.runtime.server.settings import Settings

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "What is asked for is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        422: "This server does not do that.",
        429: "Too many requests wait: try again.",
        503: "There is no memory for the cache, or the server is about to end.",
        504: "The answer was not complete in time.",
    }.items()
}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def make_app(models: Mapping[str, Model], settings: Settings) -> FastAPI:
    """OpenAI's interface over models, by their names."""
    served = Models(models)
    app = FastAPI(title="headfold", docs_url=None, redoc_url=None, responses=_REFUSALS)
    app.state.draining, app.state.meters = False, served.meters
    app.add_middleware(Guards, settings=settings, requests=served.meters.requests)
    tell_errors(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """The answer to a conversation, by the bundle's chat template; streamed, as server-sent events."""
        return await chat(body, request, served, settings)

    @app.post("/v1/completions", response_model=Completion, responses=_EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """How a text goes on; streamed, as server-sent events."""
        return await complete(body, request, served, settings)

    @app.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request) -> EmbeddingList:
        """A vector for each text, where the bundle was exported with --hidden-states."""
        return await embed(body, request, served, settings)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """The models of this server."""
        return ModelList(data=[one.card for one in served.all.values()])

    @app.get("/v1/models/{name:path}")
    async def describe_model(name: str) -> ModelCard:
        """One of them."""
        return served.find(name).card

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(served.meters.text(), media_type=CONTENT_TYPE)

    @app.get("/healthz")
    async def alive() -> Health:
        """Whether the server runs."""
        return Health(status="ok")

    @app.get("/readyz", responses={503: {"model": Health, "description": "It is about to end."}})
    async def ready(response: Response) -> Health:
        """Whether it takes requests: not once it is about to end."""
        response.status_code = 503 if app.state.draining else 200
        return Health(status="draining" if app.state.draining else "ok")

    add_pages(app, next(iter(models)))
    return app


def tell_errors(app: FastAPI) -> None:
    """Whatever is raised becomes an answer in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        what = {404: "There is nothing at this address.", 405: "This address has other methods."}
        response = Refused(error.status_code, what.get(error.status_code, str(error.detail))).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def of_nobody(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody reads it

    @app.exception_handler(HeadfoldError)
    @app.exception_handler(Refused)
    @app.exception_handler(RecursionError)
    async def of_runtime(request: Request, error: Exception) -> Response:
        return refusal_of(error).response()

    @app.exception_handler(Exception)
    async def of_ours(request: Request, error: Exception) -> Response:
        return refusal_of(error).response()
