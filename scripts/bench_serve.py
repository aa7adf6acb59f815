#!/usr/bin/env python3
"""What a server gives to many at once: tokens per second of one client and of eight, how long a short prompt waits for a long one,
and what a chat's second turn costs with and without reuse. Rounds are interleaved; medians, and ratios of them.

Another OpenAI-compatible server that runs on this machine is measured in the same rounds by --peer NAME=URL (up to /v1).
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from http_client import ask, serving, smollm2_int4

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


def question(text: str, new: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": new, "temperature": 0}


def rate(address: str, model: str | None, clients: int, extra: dict[str, Any]) -> float:
    """Tokens per second of all clients together, prompts included: what they wait for."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(
            threads.map(lambda text: ask(address, model=model, **question(text, NEW), **extra), QUESTIONS[:clients])
        )
    seconds = time.perf_counter() - began
    wrong = [answer.error for answer in answers if answer.status != 200 or answer.error]
    if wrong:
        sys.exit(f"{address}: {wrong[0]}")
    return sum(answer.usage["completion_tokens"] for answer in answers) / seconds


def beside_a_long_prompt(address: str, seed: int, tokens: int) -> tuple[float, float, float]:
    """Seconds: to the first token of a short prompt beside a long one, and of a lone one; of a chunk, where nothing is beside it."""
    alone = ask(address, **question(text_of(tokens, 2 * seed), 1))
    short = ask(address, **question(f"{seed}: one word?", 1)).times[0]
    long = threading.Thread(target=ask, args=(address,), kwargs=question(text_of(tokens, 2 * seed + 1), 1))
    long.start()
    time.sleep(alone.times[0] / 5)
    beside = ask(address, **question(f"{seed}: another word?", 1)).times[0]
    if not long.is_alive():
        sys.exit("the long prompt was computed too soon to say anything")
    long.join()
    return beside, short, alone.times[0] * CHUNK / alone.usage["prompt_tokens"]


def second_turn(address: str, seed: int, tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a second turn on a history, and how many tokens of its prompt were cached."""
    first = [{"role": "user", "content": text_of(tokens, seed)}]
    said = ask(address, messages=first, max_tokens=8, temperature=0)
    turn = [*first, {"role": "assistant", "content": said.text}, {"role": "user", "content": "And then?"}]
    answer = ask(address, messages=turn, max_tokens=1, temperature=0)
    return answer.times[0], answer.usage["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="[default: SmolLM2 int4, exported once]")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=2000, help="Tokens of the prompt that a short one comes beside.")
    parser.add_argument("--history", type=int, default=1500, help="Tokens before the second turn.")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    options = parser.parse_args()
    bundle = options.bundle or smollm2_int4()
    load = os.getloadavg()[0]
    found: dict[str, list[float]] = {}

    def note(name: str, *values: float) -> None:
        for part, value in zip(name.split(","), values, strict=True):
            found.setdefault(part, []).append(value)

    with ExitStack() as stack:
        reusing, plain = (
            stack.enter_context(serving(bundle, "--threads", options.threads, *more)) for more in ((), ("--no-reuse",))
        )
        contenders: dict[str, tuple[str, dict[str, Any]]] = {"headfold": (plain.address, {"ignore_eos": True})}
        contenders |= {
            name: (url.removesuffix("/v1"), {}) for name, _, url in (peer.partition("=") for peer in options.peer)
        }
        for round_ in range(options.rounds + 1):  # the first warms up
            found = {} if round_ == 1 else found
            for name, (address, extra) in contenders.items():
                for clients in (1, CLIENTS):
                    note(f"{name} {clients}", rate(address, None if name == "headfold" else name, clients, extra))
            note("beside,short,chunk", *beside_a_long_prompt(plain.address, round_, options.long))
            note("turn,cached", *second_turn(reusing.address, 100 + round_, options.history))
            note("turn anew,cached anew", *second_turn(plain.address, 100 + round_, options.history))
    median = {name: statistics.median(values) for name, values in found.items()}
    for name in contenders:
        one, many = median[f"{name} 1"], median[f"{name} {CLIENTS}"]
        print(f"{name}: {one:.1f} tokens/s for one client, {many:.1f} for {CLIENTS}: {many / one:.2f} times")
    print(
        f"first token of a short one: {median['short']:.3f} s alone, {median['beside']:.3f} s beside one of {options.long:,} tokens, "
        f"{median['beside'] / median['chunk']:.2f} chunks of {CHUNK} tokens ({median['chunk']:.3f} s each)"
    )
    print(
        f"first token of a second turn after {options.history:,} tokens: {median['turn']:.3f} s with reuse "
        f"({median['cached']:.0f} tokens cached), {median['turn anew']:.3f} s without: {median['turn anew'] / median['turn']:.1f} times"
    )
    print(json.dumps({"bundle": str(bundle), "threads": options.threads, "load before": load, "rounds": found}))


if __name__ == "__main__":
    main()
