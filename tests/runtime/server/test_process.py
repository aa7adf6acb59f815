"""`headfold serve` as a process: what it refuses before it listens, what it says, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner
from serving import client_of

from headfold.export.cli import main

SERVE = [sys.executable, "-c", "from headfold.export.cli import main; main()", "serve", "--threads", "1", "--port", "0"]
LONG = {"messages": [{"role": "user", "content": "the quick"}], "extra_body": {"ignore_eos": True}}


SLOW = """
import sys, time
from pathlib import Path
from script_engine import script_model
from headfold.runtime.server.app import make_app
from headfold.runtime.server.running import listen, run
from headfold.runtime.server.settings import Settings

model = script_model(Path(sys.argv[1]), lambda prompt: "on and " * 900)
decode = model.backend.decode
model.backend.decode = lambda *given: time.sleep(0.01) or decode(*given)
with listen("127.0.0.1", 0) as opened:
    address = f"slow at http://127.0.0.1:{opened.getsockname()[1]}/"
    started = lambda: print(address, file=sys.stderr, flush=True)
    run(make_app({"slow": model}, Settings()), opened, int(sys.argv[2]), started, model.close)
"""


@contextmanager
def started(*arguments: object, command: list[str] = SERVE) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server, its address and the lines it said until then; killed in the end, if it still is."""
    command = [*command, *map(str, arguments)]
    paths = os.pathsep.join(path for path in sys.path if path)  # of the fakes, too
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines: list[str] = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r" at (http://\S+)/$", line):
                    yield process, found[1], lines
                    break
            else:
                pytest.fail("".join(lines))
        finally:
            process.kill()


def test_it_ends_with_0_once_what_it_answers_is_complete(toy) -> None:
    with started(toy.path, "--name", "small") as (process, address, _):
        client = client_of(address)
        stream = client.chat.completions.create(model="small", stream=True, **LONG)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert (first.choices[0].delta.role, rest[-1].choices[0].finish_reason) == ("assistant", "length")
        assert sum(bool(chunk.choices[0].delta.content) for chunk in rest) > 10
        assert process.wait(timeout=60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("drain", "signals"), [(1, 1), (60, 2)])
def test_clients_are_told_what_is_not_complete_in_time(drain, signals, tmp_path) -> None:
    with started(tmp_path / "slow", drain, command=[sys.executable, "-c", SLOW]) as (process, address, _):
        stream = client_of(address).chat.completions.create(model="slow", stream=True, **LONG)
        next(stream)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        with pytest.raises(openai.APIError, match="The server is about to end"):
            list(stream)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


def test_who_opens_it_to_others_says_whom_to_let_in(toy, monkeypatch) -> None:
    def refused(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        return result.stderr

    monkeypatch.delenv("HEADFOLD_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com", "localhost.example.com"):
        assert "others can reach this address" in refused(toy.path, "--host", host)
    assert "contradict each other" in refused(toy.path, "--api-key", "x", "--no-auth")
    assert "empty, or not of ASCII" in refused(toy.path, "--api-key", "schlüssel")
    assert "cannot listen" in refused(toy.path, "--host", "192.0.2.1", "--no-auth")
    assert "two bundles are called toy" in refused(toy.path, toy.path, "--port", "0")
    assert "2 names are given for 1 bundles" in refused(toy.path, "--name", "a", "--name", "b", "--port", "0")
    assert "no such bundle directory" in refused(Path("/nowhere"), "--port", "0")
    for option in ("--draft", "--prefill"):
        assert f"{option} is of one bundle" in refused(toy.path, toy.path, option, toy.path)
    assert "--all-logits" in refused(toy.path, "--draft", toy.path, "--port", "0")


def test_two_models_behind_a_key_for_everybody(toy) -> None:
    arguments = (
        toy.path,
        toy.path,
        "--name",
        "a",
        "--name",
        "b",
        "--host",
        "0.0.0.0",
        "--api-key",
        "k",
        "--slots",
        "2",
    )
    with started(*arguments) as (process, address, _):
        client = client_of(address.replace("0.0.0.0", "127.0.0.1"), "k")
        assert [model.id for model in client.models.list()] == ["a", "b"]
        assert client.completions.create(model="b", prompt="the", max_tokens=1).model == "b"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
