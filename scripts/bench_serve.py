#!/usr/bin/env python3
"""What a server gives to many at once: tokens per second of one client and of eight, how long a short prompt waits for a long one,
and what a chat's second turn costs with and without reuse. Rounds are interleaved; medians, and ratios of them.

--peers measures llama.cpp's server in the same rounds, on the GGUF file that headfold's bundle was exported from. Of other engines'
packages none has a server; see peer_servers. --peer NAME=URL (up to /v1) is another OpenAI-compatible one on this machine. Compare on a
quiet machine only: llama.cpp's threads wait for each other by spinning, and are slow out of all proportion where others take a core.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_client import GGUF, Answer, ask, serving, smollm2_int4
from peer_servers import ABSENT, llama_cpp

CHUNK = 512  # tokens of a prefill step; see headfold.runtime.backend
CLIENTS, NEW = 8, 64
WORDS = [
    "the",
    "river",
    "town",
    "kept",
    "a",
    "ledger",
    "of",
    "every",
    "boat",
    "that",
    "came",
    "with",
    "salt",
    "and",
    "news",
    "from",
    "far",
]
QUESTIONS = [
    f"Tell me about {topic}." for topic in ("rain", "bread", "Rome", "trains", "glass", "cats", "salt", "chess")
]


def text_of(tokens: int, seed: int) -> str:
    """About so many tokens that no other seed begins with; a word is about one."""
    return f"Log {seed}: " + " ".join(WORDS[(place * (seed + 3) + place // 7) % len(WORDS)] for place in range(tokens))


@dataclass(frozen=True)
class Contender:
    """A server, and fields that all questions to it have."""

    name: str
    address: str
    fields: dict[str, Any] = field(default_factory=dict)

    def ask(self, text: str, new: int) -> Answer:
        """The answer of so many tokens to one question."""
        return self.answer([{"role": "user", "content": text}], new)

    def answer(self, messages: list[dict[str, str]], new: int) -> Answer:
        """The same to a conversation; what is no answer ends the script."""
        answer = ask(self.address, messages=messages, max_tokens=new, temperature=0, **self.fields)
        if answer.status != 200 or answer.error or not answer.times:
            sys.exit(f"{self.name} at {self.address}: {answer.error or 'the answer is empty'}")
        return answer


def rate(server: Contender, clients: int) -> float:
    """Tokens per second of all clients together, prompts included: what they wait for."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda text: server.ask(text, NEW), QUESTIONS[:clients]))
    return sum(answer.usage["completion_tokens"] for answer in answers) / (time.perf_counter() - began)


def beside_a_long_prompt(server: Contender, seed: int, tokens: int) -> tuple[float, float, float]:
    """Seconds: to the first token of a short prompt beside a long one, and of a lone one; of a chunk, where nothing is beside it."""
    alone = server.ask(text_of(tokens, 2 * seed), 1)
    short = server.ask(f"{seed}: one word?", 1).times[0]
    long = threading.Thread(target=server.ask, args=(text_of(tokens, 2 * seed + 1), 1))
    long.start()
    time.sleep(alone.times[0] / 5)
    if not long.is_alive():
        sys.exit(f"{server.name}: the long prompt was computed too soon to say anything")
    beside = server.ask(f"{seed}: another word?", 1).times[0]
    long.join()
    return beside, short, alone.times[0] * CHUNK / alone.usage["prompt_tokens"]


def second_turn(server: Contender, seed: int, tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a second turn on a history, and how many tokens of its prompt were cached, as far as it says so."""
    first = [{"role": "user", "content": text_of(tokens, seed)}]
    said = server.answer(first, 8)
    turn = [*first, {"role": "assistant", "content": said.text}, {"role": "user", "content": "And then?"}]
    answer = server.answer(turn, 1)
    return answer.times[0], (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


class Measured:
    """A server in all rounds: `anew` computes every prompt, `reusing` is how it comes. The same where that cannot be chosen."""

    def __init__(self, reusing: Contender, anew: Contender | None = None) -> None:
        self.name, self.reusing, self.anew = reusing.name, reusing, anew
        self.found: dict[str, list[float]] = {}

    def round(self, number: int, long: int, history: int) -> None:
        """All questions once; the first round warms up."""
        if number == 1:
            self.found = {}
        plain = self.anew or self.reusing
        self._note("one", rate(plain, 1))
        self._note("many", rate(plain, CLIENTS))
        self._note("beside,short,chunk", *beside_a_long_prompt(plain, number, long))
        self._note("turn,cached", *second_turn(self.reusing, 100 + number, history))
        if self.anew is not None:
            self._note("turn anew", second_turn(self.anew, 100 + number, history)[0])

    def _note(self, names: str, *values: float) -> None:
        for name, value in zip(names.split(","), values, strict=True):
            self.found.setdefault(name, []).append(value)

    def row(self) -> str:
        """Of the table."""
        of = {name: statistics.median(values) for name, values in self.found.items()}
        anew = of.get("turn anew", float("nan"))
        return (
            f"{self.name:12}{of['one']:9.1f}{of['many']:10.1f}{of['many'] / of['one']:7.2f}"
            f"{of['short']:10.3f}{of['beside']:9.3f}{of['chunk']:9.3f}{of['beside'] / of['chunk']:8.2f}"
            f"{of['turn']:10.3f}{of['cached']:8.0f}{anew:9.3f}{anew / of['turn']:7.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="[default: SmolLM2 int4, exported once]")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=2000, help="Tokens of the prompt that a short one comes beside.")
    parser.add_argument("--history", type=int, default=1500, help="Tokens before the second turn.")
    parser.add_argument("--peers", action="store_true", help="Beside llama.cpp's server, with SmolLM2's GGUF file.")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    options = parser.parse_args()
    bundle, load = options.bundle or smollm2_int4(), os.getloadavg()[0]
    with ExitStack() as stack:
        whole = {"ignore_eos": True}
        reusing, anew = (
            stack.enter_context(serving(bundle, "--threads", options.threads, *more)).address
            for more in ((), ("--no-reuse",))
        )
        servers = [Measured(Contender("headfold", reusing, whole), Contender("headfold", anew, whole))]
        if options.peers:
            address = stack.enter_context(llama_cpp(GGUF, options.threads, CLIENTS))
            again = Contender("llama.cpp", address, whole)
            servers.append(Measured(again, Contender("llama.cpp", address, whole | {"cache_prompt": False})))
        for name, _, url in (peer.partition("=") for peer in options.peer):
            servers.append(Measured(Contender(name, url.removesuffix("/v1"), {"model": name})))
        for number in range(options.rounds + 1):
            for server in itertools.islice(itertools.cycle(servers), number, number + len(servers)):
                server.round(number, options.long, options.history)
    print(
        f"{options.threads} threads, medians of {options.rounds} rounds, load of the machine before {load:.1f}; "
        f"tokens/s of clients; seconds to first tokens: of a short prompt, alone and beside one of {options.long:,} tokens, "
        f"and in chunks of {CHUNK} tokens; of a second turn after {options.history:,} tokens, reusing and anew"
    )
    print(
        f"{'':12}{'1 client':>9}{f'{CLIENTS} clients':>10}{'times':>7}{'short':>10}{'beside':>9}{'a chunk':>9}{'chunks':>8}"
        f"{'turn':>10}{'cached':>8}{'anew':>9}{'times':>7}"
    )
    for server in servers:
        print(server.row())
    if options.peers:
        for name, why in ABSENT.items():
            print(f"{name}: not measured; {why}")
    rounds = {server.name: server.found for server in servers}
    print(json.dumps({"bundle": str(bundle), "threads": options.threads, "load before": load, "rounds": rounds}))


if __name__ == "__main__":
    main()
