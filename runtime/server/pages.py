"""What people see: a chat at /, and the interface for programs at /docs. Nothing of it comes from, or goes to, anywhere else."""

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_TYPES = {"css": "text/css", "js": "text/javascript"}


def add_pages(app: FastAPI, model: str) -> None:
    """To an application whose other routes are there; `model` stands in an example."""
    folder = files("headfold.runtime.server") / "static"
    texts = {name: (folder / name).read_text() for name in ("chat.html", "docs.html.j2", "style.css", "chat.js")}
    docs = Environment(autoescape=True).from_string(texts["docs.html.j2"])

    @app.get("/", include_in_schema=False)
    async def chat() -> Response:
        return HTMLResponse(texts["chat.html"], headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def interface(request: Request) -> Response:
        facts = {"address": request.base_url, "model": model, "routes": list(_routes(app.openapi()))}
        return HTMLResponse(docs.render(facts), headers=_HEADERS)

    for name in ("style.css", "chat.js"):
        _add_file(app, name, texts[name])


def _add_file(app: FastAPI, name: str, text: str) -> None:
    @app.get(f"/static/{name}", include_in_schema=False)
    async def file() -> Response:
        return Response(text, headers=_HEADERS, media_type=_TYPES[name.rpartition(".")[2]])


def _routes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the page says of each route."""
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = _resolved(body, document)
            required = schema.get("required", [])
            fields = [
                {
                    "name": name,
                    "required": name in required,
                    "kind": _kind(of, document),
                    "what": of.get("description", ""),
                }
                for name, of in schema.get("properties", {}).items()
            ]
            yield {"method": method.upper(), "path": path, "what": route.get("description", ""), "fields": fields}


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def _kind(schema: dict[str, Any], document: dict[str, Any]) -> str:
    """A schema in words."""
    if "anyOf" in schema:
        return " or ".join(kind for one in schema["anyOf"] if (kind := _kind(one, document)) != "null")
    if "$ref" in schema:
        return str(_resolved(schema, document).get("title", "object"))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}), document)}"
    return str(schema.get("type", "anything"))
