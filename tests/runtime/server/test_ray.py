"""The server on Ray Serve: its parts by themselves, and a local cluster of two replicas, of which one is killed."""

import asyncio
import http.client
import json
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from click.testing import CliRunner
from script_engine import script_model
from serving import client_of

pytest.importorskip("ray.serve")
import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.scripts import cli

from headfold.export.cli.using.serve import serve as headfold_serve
from headfold.runtime import load
from headfold.runtime.errors import InputError
from headfold.runtime.scheduling.lookup import Timing
from headfold.runtime.server.app import make_app
from headfold.runtime.server.ray import app
from headfold.runtime.server.ray.arguments import Arguments
from headfold.runtime.server.ray.deployments import REPLICA, Ingress, ModelServer
from headfold.runtime.server.ray.routing import Affinity, beginnings
from headfold.runtime.server.settings import Limits, Settings

LARGEST, SLOTS = 4096, 4
CLIENTS, EACH = 8, 8
CHAT = {"model": "script", "messages": [{"role": "user", "content": "hi"}]}


def told(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of `serve run`, which is not to come as far as a cluster."""
    result = CliRunner().invoke(cli, ["run", "headfold.runtime.server.ray:app", *arguments])
    assert not ray.is_initialized()
    return result.exit_code, [line for line in result.stderr.splitlines() if line.startswith("Error")]


def test_serve_run_tells_what_is_wrong_in_one_line_before_anything_starts(toy, make_toy, changed, monkeypatch) -> None:
    monkeypatch.delenv("HEADFOLD_API_KEY", raising=False)
    altered = changed({})
    (altered / "tokenizer.json").write_bytes(b"{}")
    bundle, half = f"bundle={toy.path}", make_toy(dtype="float16")
    for arguments, what in (
        (["bundle=/nowhere", "no_auth=true"], "/nowhere: no such bundle directory"),
        ([f"bundle={altered}", "no_auth=true"], "tokenizer.json: has 2 bytes, not the"),
        (["no_auth=true"], "bundle: Field required"),
        ([bundle], "set HEADFOLD_API_KEY"),
        ([bundle, "api_key=schlüssel"], "empty, or not of ASCII"),
        ([bundle, "api_key=k", "no_auth=true"], "contradict each other"),
        ([bundle, "no_auth=true", "replica=2"], "replica: Extra inputs are not permitted"),
        ([bundle, "no_auth=true", "replicas=0"], "replicas: Input should be greater than 0"),
        ([bundle, "no_auth=true", 'autoscaling_config={"min_replicas": 3, "max_replicas": 2}'], "max_replicas"),
        ([bundle, "no_auth=true", "autoscaling_config={"], "autoscaling_config: "),
        ([bundle, "no_auth=true", "attention=plugin"], "chooses a TensorRT engine"),
        ([bundle, "no_auth=true", "reuse=false", "keep_bytes=1"], "keep_bytes is of prompts that are kept"),
        ([bundle, "no_auth=true", "draft=/nowhere"], "/nowhere: no such bundle directory"),
        ([bundle, "no_auth=true", f"draft={altered}"], "tokenizer.json: has 2 bytes, not the"),
        ([bundle, "no_auth=true", f"draft={toy.path}"], "--all-logits"),
        ([bundle, "no_auth=true", "prefill=/nowhere"], "/nowhere: no such bundle directory"),
        ([bundle, "no_auth=true", f"prefill={altered}"], "tokenizer.json: has 2 bytes, not the"),
        ([bundle, "no_auth=true", f"prefill={half.path}"], "its dtype is float16"),
        ([bundle, "no_auth=true", f"prefill={toy.path}", "provider=cuda"], "only with ONNX Runtime on the CPU"),
    ):
        code, lines = told(*arguments)
        assert (code, len(lines)) == (2, 1), arguments
        assert what in lines[0]


def test_it_takes_what_headfold_serve_takes() -> None:
    """But for the address, which is Ray's, and --no-reuse, which is reuse=false; an application has one bundle."""
    served = {option.name for option in headfold_serve.params} - {"bundles", "names", "host", "port", "no_reuse"}
    assert served | {"bundle", "name", "reuse"} <= set(Arguments.model_fields)


def test_python_gets_headfold_s_own_errors() -> None:
    with pytest.raises(InputError, match="replicas and autoscaling_config contradict"):
        app({"bundle": "b", "no_auth": True, "replicas": 2, "autoscaling_config": {"max_replicas": 2}})


def test_a_replica_is_added_where_the_slots_do_not_suffice(monkeypatch) -> None:
    monkeypatch.setenv("HEADFOLD_API_KEY", "k")
    given = Arguments.read(
        {"bundle": "b", "slots": "4", "autoscaling_config": '{"min_replicas": 2, "max_replicas": 5}'}
    )
    assert given.autoscaling is not None
    assert (given.autoscaling.min_replicas, given.autoscaling.target_ongoing_requests, given.most_replicas) == (2, 4, 5)
    assert given.settings.key == "k"
    own = Arguments.read({"bundle": "b", "autoscaling_config": {"max_replicas": 2, "target_ongoing_requests": 3}})
    assert own.autoscaling is not None
    assert own.autoscaling.target_ongoing_requests == 3


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_a_conversation_s_next_turn_begins_as_the_last_one_did() -> None:
    first = [{"role": "system", "content": "s" * 200}, {"role": "user", "content": "u" * 200}]
    turn = beginnings(body(model="m", messages=first))
    later = beginnings(body(model="m", messages=[*first, {"role": "assistant", "content": "a" * 500}], n=2))
    assert len(later) > len(turn) > 5
    assert later[: len(turn) - 1] == turn[:-1]  # where one ends with a bracket, the other goes on
    others = beginnings(body(model="m", messages=[first[0], {"role": "user", "content": "v" * 200}]))
    alike = sum(a == b for a, b in zip(turn, others, strict=False))
    assert 0 < alike < len(turn)
    assert not set(turn) & set(beginnings(body(model="other", messages=first)))
    for no_request in (b"", b"{", b"[]", b"3", body(model="m"), body(messages=[]), b"[" * 100_000, b"\xff"):
        assert beginnings(no_request) == ()
    assert len(beginnings(body(prompt="x" * 1_000_000))) == 512


def test_the_replica_that_has_the_longest_beginning_is_chosen_while_loads_are_alike() -> None:
    affinity, prompt = Affinity[str](slack=2, most=4), [b"1", b"2", b"3"]
    assert affinity.choose(prompt, {"a": 1, "b": 0}) == "b"
    affinity.remember(prompt[:2], "a")
    assert affinity.choose(prompt, {"a": 2, "b": 0}) == "a"
    assert affinity.choose(prompt, {"a": 3, "b": 0}) == "b"
    affinity.remember(prompt, "b")
    assert affinity.choose(prompt, {"a": 0, "b": 1}) == "b"
    assert affinity.choose(prompt[:1], {"a": 0, "b": 1}) == "a"
    assert affinity.choose(prompt, {"a": 0, "c": 0}) == "a"  # b is no more
    assert affinity.choose([b"4"], {"a": 1, "b": 0}) == "b"
    affinity.remember([b"5", b"6", b"7", b"8"], "b")  # the eldest are forgotten
    assert affinity.choose(prompt, {"a": 1, "b": 0}) == "b"
    affinity.remember([b"9"], "a")
    affinity.forget("a")
    assert affinity.choose([b"9"], {"a": 1, "b": 0}) == "b"


class Servers:
    """Stands for Ray's handle: each request takes the next of `answers`, whose last piece may be an exception."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.cancelled = list(answers), 0
        self.answer = SimpleNamespace(remote=self._remote)

    def options(self, **_: Any) -> "Servers":
        return self

    def _remote(self, *_: Any, **__: Any) -> Any:
        pieces, servers = self.answers.pop(0), self

        class Stream:
            def cancel(self) -> None:
                servers.cancelled += 1

            async def __aiter__(self) -> AsyncIterator[Any]:
                for piece in pieces:
                    if isinstance(piece, Exception):
                        raise piece
                    if piece is None:
                        await asyncio.Future()
                    yield piece

        return Stream()


def ask(servers: Servers, gone: bool = False, seconds: float = 60) -> tuple[int, bytes]:
    """Status and body of what the ingress answers in so many seconds; `gone`: the client does not wait for it."""
    came = [{"type": "http.request", "body": b"{}", "more_body": False}]
    came += [{"type": "http.disconnect"}] if gone else []
    sent: list[Any] = []

    async def receive() -> Any:
        return came.pop(0) if came else await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    ingress = Ingress(servers, Settings(limits=Limits(seconds=seconds)))
    asyncio.run(ingress.__serve_build_asgi_app__()(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def head(kind: str = "application/json") -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def piece(content: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_another_replica_is_asked_as_long_as_nothing_was_sent() -> None:
    died = ActorDiedError()
    assert ask(Servers([died], [head(), died], [head(), piece(b"yes")])) == (200, b"yes")
    assert ask(Servers([head(), piece(b"yes"), died])) == (200, b"yes")
    status, content = ask(Servers([died], [died], [died]))
    assert (status, b"3 replicas ended" in content) == (503, True)
    status, content = ask(Servers([head("text/event-stream"), piece(b"data: 1\n\n", more=True), died]))
    assert content.startswith(b"data: 1\n\ndata: {")
    assert b"has ended" in content
    assert b"[DONE]" not in content


def test_what_no_replica_can_answer_is_told_in_openai_s_shape() -> None:
    full = BackPressureError(num_queued_requests=3, max_queued_requests=2)
    failed = DeploymentUnavailableError(DeploymentID("ModelServer", "default"))
    for answer, status, seconds in (([full], 429, 60), ([failed], 503, 60), ([None], 504, 0.05)):
        got, content = ask(Servers(answer), seconds=seconds)
        assert (got, json.loads(content).keys()) == (status, {"error"})


def test_a_client_that_goes_away_ends_its_answer() -> None:
    servers = Servers([None])
    assert ask(servers, gone=True) == (499, b"")
    assert servers.cancelled == 1


def test_a_replica_s_draft_guesses(make_toy, monkeypatch) -> None:
    monkeypatch.setattr(Timing, "cost", 1.0)
    here = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: here)
    bundle, draft = make_toy(all_logits=True).path, make_toy().path
    given = Arguments.read({"bundle": bundle, "draft": draft, "slots": "2", "no_auth": "true"})
    server = ModelServer(given.bundle, "toy", given.settings, **given.loading)
    asked = body(model="toy", prompt=[5, 17, 200], max_tokens=40, ignore_eos=True)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def answered() -> tuple[list[Any], str]:
        return [message async for message in server.answer(scope, asked, ())], (await server.metrics())[1]

    messages, metrics = asyncio.run(answered())
    assert messages[0]["status"] == 200
    accepted = next(line for line in metrics.splitlines() if line.startswith("headfold_accepted_tokens_total{"))
    assert float(accepted.split()[-1]) > 20


def test_a_replica_stops_writing_an_answer_that_nobody_takes(tmp_path) -> None:
    with script_model(tmp_path / "script", lambda _: "yes " * 500) as model:
        server = ModelServer.__new__(ModelServer)
        server._app, server._id = make_app({"script": model}, Settings(announces=False)), "r1"
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}

        async def leave() -> Any:
            model.backend.hold()
            answer = server.answer(scope | {"headers": headers}, body(**CHAT, stream=True), ())
            first = await anext(answer)
            waits = asyncio.create_task(anext(answer))
            done, _ = await asyncio.wait([waits], timeout=0.2)
            assert not done  # it has said nothing yet: another replica could say it
            model.backend.turn.release(3)
            assert b"assistant" in (await waits)["body"]
            await answer.aclose()
            model.backend.turn.release(1 << 20)
            return first

        first = asyncio.run(leave())
        assert (REPLICA.encode(), b"r1") in first["headers"]
        while model.status().live:
            time.sleep(0.01)
        assert model.status().new_tokens < 100


@pytest.fixture(scope="module")
def address(toy) -> Iterator[str]:
    """Of a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
    place = tempfile.mkdtemp(prefix="ray")  # the paths of its sockets are bounded
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else it writes one into the home directory
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.delenv("RAY_ADDRESS", raising=False)
        try:
            quiet: Any = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": place}
            ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, **quiet)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            given = {"bundle": toy.path, "name": "toy", "replicas": 2, "slots": SLOTS, "waiting": 2 * CLIENTS}
            serve.run(app(given | {"api_key": "k", "max_body": LARGEST}))
            yield f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()
            rmtree(place, ignore_errors=True)


def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_a_cluster_answers_as_one_server(address, toy) -> None:
    client = client_of(address, "k")
    assert [model.id for model in client.models.list()] == ["toy"]
    assert get(address, "/healthz") == get(address, "/readyz") == (200, '{"status":"ok"}')
    assert get(address, "/v1/models")[0] == 401
    with pytest.raises(openai.AuthenticationError):
        client_of(address, "other").models.list()
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="toy", prompt="x" * LARGEST)
    assert refused.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="x")
    chat = {"model": "toy", "messages": [{"role": "user", "content": "the quick"}], "max_tokens": 9}
    whole = client.chat.completions.create(**chat).choices[0].message.content
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**chat, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole

    def who(prompt: list[int]) -> str:
        raw = client.completions.with_raw_response.create(model="toy", prompt=prompt, max_tokens=1)
        cached.append(raw.parse().usage.prompt_tokens_details.cached_tokens)
        return raw.headers[REPLICA]

    for prompt in (list(range(100, 140)), list(range(140, 180))):
        cached: list[int] = []
        assert len({who(prompt) for _ in range(4)}) == 1
        assert cached[0] == 0 < min(cached[1:])
    status, metrics = get(address, "/metrics", authorization="Bearer k")
    slots = [line for line in metrics.splitlines() if line.startswith("headfold_slots{")]
    assert (status, len(slots), all(line.endswith(f" {SLOTS}.0") for line in slots)) == (200, 2, True)


def test_a_killed_replica_takes_no_request_with_it(address, toy) -> None:
    """Not even those that it was answering, unless they are streams that had begun."""
    client, rng = client_of(address, "k"), np.random.default_rng(0)
    prompts = [rng.integers(1, toy.config.vocab_size, rng.integers(3, 12)).tolist() for _ in range(CLIENTS)]
    with load(toy.path, threads=1, slots=1) as alone:
        right = [alone.generate(prompt, max_new_tokens=40, ignore_eos=True).text for prompt in prompts]
    replicas = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[:1] == ["ray::ServeReplica:default:ModelServer"]
    ]
    assert len(replicas) == 2
    answered, warm = threading.Semaphore(0), CLIENTS * EACH // 4

    def ask_often(index: int) -> list[tuple[str, str]]:
        found = []
        options: Any = {"model": "toy", "prompt": prompts[index], "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        for _ in range(EACH):
            text, end = "", ""
            try:
                if index % 2:
                    for part in client.completions.create(stream=True, **options):
                        text += part.choices[0].text
                else:
                    text = client.completions.create(**options).choices[0].text
            except openai.APIError as error:
                end = error.message
            found.append((text, end))
            answered.release()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(ask_often, index) for index in range(CLIENTS)]
        for _ in range(warm):
            assert answered.acquire(timeout=60)
        replicas[0].send_signal(signal.SIGSTOP)  # it keeps what it has, so that it has something when it ends
        while answered.acquire(timeout=1):  # the other one answers the rest, but for who waits for this one
            pass
        waiting = sum(not answer.done() for answer in answers)
        os.kill(replicas[0].pid, signal.SIGKILL)
        found = [answer.result(timeout=60) for answer in answers]
    assert waiting > 0
    for index, (given, text) in enumerate(zip(found, right, strict=True)):
        broken = [(begun, end) for begun, end in given if end]
        assert len(broken) <= index % 2  # a client has one stream at a time
        assert all(begun and text.startswith(begun) and "has ended" in end for begun, end in broken)
        assert [whole for whole, end in given if not end] == [text] * (EACH - len(broken))
