"""Who is let in, and how much is read; below OpenAI's client, which would send none of this."""

import http.client
import json
import socket
from urllib.parse import urlsplit

import openai
import pytest
from script_engine import script_model
from serving import client_of, serving

from headfold.runtime.server.settings import Limits, Settings

BODY = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with script_model(tmp_path_factory.mktemp("guards") / "script", lambda _: "yes") as model:
        yield model


def ask(address: str, method: str, path: str, body: str | bytes | None = None, **headers: str) -> tuple[int, dict]:
    """Status and the error, or the answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read() or "{}")
    return response.status, content.get("error", content)


def test_a_key_is_asked_for_everywhere_but_where_nothing_is_told(model) -> None:
    with serving({"script": model}, Settings(key="s3cret")) as address:
        assert (
            client_of(address, "s3cret").chat.completions.create(model="script", **BODY).choices[0].message.content
            == "yes"
        )
        for key in ("s3cre", "s3cret2", "S3CRET", "ü"):
            status, error = ask(address, "GET", "/v1/models", authorization=f"Bearer {key}")
            assert (status, error["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "other").models.list()
        for path in ("/v1/models", "/v1/chat/completions", "/nothing", "/v1/models/"):
            assert ask(address, "GET", path)[0] == 401, path
        assert ask(address, "GET", "/v1/models", authorization="Basic s3cret")[0] == 401
        assert ask(address, "GET", "/healthz") == ask(address, "GET", "/readyz") == (200, {"status": "ok"})


def test_a_page_of_another_name_cannot_ask_a_server_without_a_key(model) -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "::1"})
    with serving({"script": model}, Settings(hosts=hosts)) as address:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:99", "[::1]:1"):
            assert ask(address, "GET", "/v1/models", Host=host)[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", "[", "", "127.0.0.1@evil.example"):
            assert ask(address, "GET", "/v1/models", Host=host)[0] == 421, host
        status, error = ask(address, "POST", "/v1/chat/completions", json.dumps(BODY), **{"content-type": "text/plain"})
        assert (status, "application/json" in error["message"]) == (400, True)  # what a form of another site can send


def test_bodies_over_the_limit_are_not_read(model) -> None:
    with serving({"script": model}, Settings(limits=Limits(body_bytes=1000, body_seconds=0.2))) as address:
        large = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]})
        status, error = ask(address, "POST", "/v1/chat/completions", large, **JSON)
        assert (status, error["code"]) == (413, "request_too_large")
        chunks = iter([large.encode()] * 3)
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        connection.request("POST", "/v1/chat/completions", chunks, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=60) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"7" * 5000,
        b"[" * 100_000,
        b'{"messages":' * 2000,
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"model":"\\ud800"}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"messages":[{"role":"user","content":"x"}],"seed":1' + b"0" * 4000 + b"}",
        b'{"messages":[{"role":"user","content":"x"}],"\\ud800":1}',
        b'{"messages":[{"role":"user","content":"x","deep":' + b"[" * 900 + b"]" * 900 + b"}]}",
    ],
)
def test_bodies_that_are_no_request_are_refused_in_openais_shape(body, model) -> None:
    with serving({"script": model}) as address:
        status, error = ask(address, "POST", "/v1/chat/completions", body, **JSON)
        assert 400 <= status < 500
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        for method, path, wanted in (("GET", "/v1/completions", 405), ("POST", "/nothing", 404)):
            assert ask(address, method, path)[0] == wanted
