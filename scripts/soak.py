#!/usr/bin/env python3
"""Many clients at one server for minutes: prompts and answers of random lengths, clients that leave, requests that are wrong.

Exit code 1 if a finished answer is not the one a lone client got, if memory grows, a slot stays taken, or SIGTERM is not a drain.
Where the cache has most of a prompt, the rest is computed in a smaller part, which may round otherwise: a lone client asks twice, and
either answer will do. What is neither is counted as a near-tie where the two likeliest tokens were nearly as likely.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from bench_serve import text_of
from http_client import Answer, Server, ask, serving, smollm2_int4

MOST = 32  # new tokens
NEAR = 0.05  # nats between the two likeliest tokens
FLAT = 1.05
GRACE = 20  # seconds after the last client in which all slots must be free
WRONG: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "x " * 20_000}]},
    {"messages": [{"role": "user", "content": "x"}], "no_such": 1},
    {"messages": [{"role": "user", "content": "x"}], "model": "none"},
    {"messages": [{"role": "user", "content": "x"}], "n": 100_000},
]


@dataclass
class Lone:
    """What a lone client got for a prompt: each token's text so far, and by how much it was the likeliest."""

    texts: list[str]
    leads: list[float]
    ended: bool

    def judge(self, answer: Answer, asked: int) -> str:
        """What the answer to the same prompt, of at most so many tokens, is: the same, a near-tie, or other."""
        wanted = self.texts[min(asked, len(self.texts)) - 1]
        reason = "stop" if self.ended and asked >= len(self.leads) else "length"
        if answer.text == wanted and answer.finish_reason == reason:
            return "same"
        alike = next(
            (at for at, (one, other) in enumerate(zip(answer.text, wanted, strict=False)) if one != other), len(wanted)
        )
        place = next((place for place, text in enumerate(self.texts) if len(text) > alike), len(self.leads) - 1)
        near = min(self.leads[max(0, place - 1) : place + 2]) < NEAR  # a token's text may begin like the other's
        return "near-tie" if near else f"other at token {place}, lead {self.leads[place]:.3f}"


def lone(address: str, prompt: str) -> Lone:
    answer = ask(
        address,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=MOST,
        logprobs=True,
        top_logprobs=2,
    )
    raw, texts = b"", []
    ended = answer.finish_reason == "stop"
    for token in answer.tokens[: -1 if ended else None]:
        raw += bytes(token["bytes"])
        texts.append(raw.decode(errors="replace"))
    leads = [token["top_logprobs"][0]["logprob"] - token["top_logprobs"][1]["logprob"] for token in answer.tokens]
    assert texts[-1] == answer.text, (texts[-1], answer.text)
    return Lone([*texts, *texts[-1:]] if ended else texts, leads, ended)


def _goodness(judged: str) -> int:
    return ("near-tie", "same").index(judged) if judged in ("near-tie", "same") else -1


class Soak:
    """The clients, and what they saw."""

    def __init__(self, server: Server, prompts: list[str], alone: list[list[Lone]]) -> None:
        self.server, self.prompts, self.alone = server, prompts, alone
        self.seen: Counter[str] = Counter()
        self.over = False
        self.ending = False  # SIGTERM was sent
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.over:
            try:
                what = self._one(rng)
            except OSError as error:  # nobody listens any more
                if not self.ending:
                    self._count(f"other {type(error).__name__}: {error}")
                return
            self._count(what)

    def _count(self, what: str) -> None:
        with self._lock:
            self.seen[what] += 1

    def _one(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.1:
            status = ask(self.server.address, **rng.choice(WRONG)).status
            return "refused" if status in (400, 404, 413, 422) else f"other status {status} to a wrong request"
        place, new = rng.randrange(len(self.prompts)), rng.randint(1, MOST)
        body = {"messages": [{"role": "user", "content": self.prompts[place]}], "temperature": 0, "max_tokens": new}
        if kind < 0.3:
            answer = ask(self.server.address, leave_after=rng.randint(0, 10), **body)
            return "left" if answer.status == 200 else f"status {answer.status}"
        answer = ask(self.server.address, **body)
        if answer.status == 429:
            time.sleep(1)
            return "busy"
        if answer.status != 200 or answer.error is not None or answer.finish_reason is None:
            return f"other status {answer.status}, error {answer.error}, cut {answer.finish_reason is None}"
        return max((one.judge(answer, new) for one in self.alone[place]), key=_goodness)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="[default: SmolLM2 int4, exported once]")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    prompts = [text_of(rng.choice((3, 10, 40, 150, 400)), seed) for seed in range(20)]
    # What the cache keeps is bounded low, so that it is full within the first minute, and what is measured is the rest.
    with serving(
        options.bundle or smollm2_int4(), "--threads", options.threads, "--keep-bytes", str(64 << 20)
    ) as server:
        alone = [[lone(server.address, prompt) for _ in range(2)] for prompt in prompts]
        soak = Soak(server, prompts, alone)
        clients = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(options.clients)]
        process, memory = psutil.Process(server.process.pid), list[tuple[float, int]]()
        began = time.monotonic()
        for client in clients:
            client.start()
        while (passed := time.monotonic() - began) < options.minutes * 60:
            time.sleep(1)
            memory.append((passed, process.memory_info().rss))
        soak.over = True
        for client in clients:
            client.join()
        after, stuck = server.metrics(), 0.0
        for _ in range(GRACE):  # a client that has just left is noticed at the next step
            if not (stuck := after["headfold_live"] + after["headfold_waiting"]):
                break
            time.sleep(1)
            after = server.metrics()
        soak.over = False  # and once more, to be ended in the midst of it
        clients = [threading.Thread(target=soak.client, args=(1000 + seed,)) for seed in range(options.clients)]
        for client in clients:
            client.start()
        time.sleep(5)
        soak.ending = True
        code = server.end()
        for client in clients:
            client.join()
    second = statistics.median(rss for passed, rss in memory if 60 <= passed < 120)
    last = statistics.median(rss for passed, rss in memory[-60:])
    grown, other = last / second, sum(count for what, count in soak.seen.items() if what.startswith("other"))
    good = not other and not stuck and code == 0 and grown <= FLAT
    facts = {"seen": dict(soak.seen), "stuck": stuck, "exit code": code, "memory": [second, last], "metrics": after}
    print(json.dumps(facts))
    print(
        f"{'passed' if good else 'FAILED'}: {soak.seen['same']} answers as alone, {soak.seen['near-tie']} near-ties, {other} others, "
        f"{soak.seen['left']} clients left, {soak.seen['refused']} wrong requests, {soak.seen['busy']} times busy; "
        f"memory {grown:.3f} times that of the second minute; {stuck:.0f} slots stuck; SIGTERM: exit code {code}"
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
