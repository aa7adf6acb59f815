"""What bench_serve and soak share: a `headfold serve` of their own, and questions to it over plain HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
INT4 = ROOT / "bundles" / "smollm2-int4"
HEADFOLD = ROOT / ".venv" / "bin" / "headfold"


def smollm2_int4() -> Path:
    """The bundle that both ask; exported once."""
    if not INT4.is_dir():
        INT4.parent.mkdir(exist_ok=True)
        subprocess.run(
            [HEADFOLD, "export", GGUF, "-o", INT4, "--weights", "int4", "--max-kl", "1", "--no-verify"], check=True
        )
    return INT4


@dataclass
class Server:
    """One that runs."""

    process: subprocess.Popen[str]
    address: str

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics whose only label is the model."""
        text = get(self.address, "/metrics")
        found = re.findall(r'^(\w+)\{model="[^"]*"\} (\S+)$', text, re.MULTILINE)
        return {name: float(value) for name, value in found if not name.endswith("_created")}


@contextmanager
def serving(bundle: Path, *arguments: str) -> Iterator[Server]:
    """On a free port; killed in the end, if it still runs."""
    command = [HEADFOLD, "serve", bundle, "--port", "0", *arguments]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r" at (http://\S+)/$", line)
            if found is None:
                raise SystemExit(f"the server did not start: {line}")
            yield Server(process, found[1])
        finally:
            process.kill()


def get(address: str, path: str) -> str:
    """A page."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


@dataclass
class Answer:
    """What came, and when: seconds from the question to each piece of text."""

    status: int
    text: str = ""
    times: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    tokens: list[dict[str, Any]] = field(default_factory=list)  # with logprobs
    error: str | None = None


def ask(address: str, path: str = "/v1/chat/completions", leave_after: int | None = None, **body: Any) -> Answer:
    """One streamed question; `leave_after` so many pieces, the connection is closed."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    began = time.perf_counter()
    body = {"stream": True, "stream_options": {"include_usage": True}} | body
    try:
        connection.request("POST", parts.path + path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Answer(response.status, error=response.read().decode())
        answer = Answer(200)
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = event["error"]["message"]
                return answer
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                answer.tokens += (choice.get("logprobs") or {}).get("content") or []
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if piece:
                    answer.text += piece
                    answer.times.append(time.perf_counter() - began)
            if leave_after is not None and len(answer.times) >= leave_after:
                return answer
        return answer
    finally:
        connection.close()
