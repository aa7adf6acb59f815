"""How long a bundle takes to decode a token: medians of interleaved rounds, and what they were measured on."""

import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headfold.runtime import load
from headfold.runtime.cpu import physical_cores


@dataclass(frozen=True)
class Timing:
    """What to time: contexts in tokens, how often, tokens timed together at each context, and ONNX Runtime's threads."""

    contexts: tuple[int, ...]
    rounds: int = 5
    decode_tokens: int = 16
    threads: int | None = None  # default: physical cores


def time_decoding(bundles: Mapping[int, Path], options: Timing) -> dict[int, dict[int, float]]:
    """Seconds per token when one sequence decodes after `context` tokens, by count and context: medians of interleaved rounds.

    The cache's contents are zeros: what they are makes no difference to the time.
    """
    backends = {count: load(path, threads=options.threads).backend for count, path in bundles.items()}
    samples: dict[tuple[int, int], list[float]] = {}
    active, token = np.ones(1, np.bool_), np.zeros(1, np.int64)
    for context in options.contexts:
        caches = {count: backend.new_cache(1, context + options.decode_tokens) for count, backend in backends.items()}
        for number in range(options.rounds + 1):  # the first one warms up
            for count, backend in backends.items():
                cache = caches[count]
                cache.lengths[:] = context
                start = time.perf_counter()
                for _ in range(options.decode_tokens):
                    backend.decode(cache, token, active)
                if number:
                    elapsed = (time.perf_counter() - start) / options.decode_tokens
                    samples.setdefault((count, context), []).append(elapsed)
    return {count: {c: statistics.median(samples[count, c]) for c in options.contexts} for count in bundles}


def machine(threads: int | None) -> dict[str, object]:
    """What the times were measured on."""
    return {
        "processor": _processor(),
        "threads": threads or physical_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": "onnxruntime, CPU",
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
