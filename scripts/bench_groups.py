"""Decode speed against the number of key/value heads, on one larger random model: the measured form of Ainslie et al. 2023, figure 6.

Called by `scripts/bench.py --groups`. All variants share weights' sizes but for K and V; contexts are filled caches, not prompts.
Rounds are interleaved and only medians are told.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.config import ModelConfig
from headfold.export.model.initialize import new_decoder
from headfold.export.progress import Reporter
from headfold.runtime import load

CONTEXTS = (512, 1024, 2048, 4096, 8192)
GROUPS = {"MHA": 16, "GQA-4": 4, "MQA": 1}


def config(groups: int) -> ModelConfig:
    """12 layers, 1024 wide, 16 heads of 64; a small vocabulary, so that the head does not drown the attention."""
    return ModelConfig(
        model_type="llama",
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=groups,
        head_dim=64,
        max_position_embeddings=max(CONTEXTS) + 64,
    )


def bundle(folder: Path, name: str, groups: int) -> Path:
    """The exported variant, made at the first call."""
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"{name}-hf"
        shutil.rmtree(source, ignore_errors=True)
        decoder = new_decoder(config(groups), seed=0, capacity=1)
        save_hf(source, MemoryCheckpoint(source, config(groups), decoder.state_dict()), torch.float32)
        export_bundle(open_exportable(source), path, ExportOptions(verify=False), Reporter(quiet=True))
        shutil.rmtree(source)
    return path


def cache_bytes(groups: int, context: int) -> int:
    """Of float32 keys and values that one step reads."""
    c = config(groups)
    return 2 * c.num_hidden_layers * groups * c.head_dim * 4 * context


def groups(folder: Path, rounds: int, new: int, threads: int, bandwidth: Callable[[int], float]) -> dict[str, Any]:
    """Measure, print the table, and return it. `new` tokens are decoded behind each context, one sequence."""
    paths = {name: bundle(folder, name, count) for name, count in GROUPS.items()}
    weights = {name: (path / "model.onnx.data").stat().st_size for name, path in paths.items()}
    backends = {name: load(str(path), threads=threads).backend for name, path in paths.items()}
    caches = {name: backend.new_cache(1, max(CONTEXTS) + new) for name, backend in backends.items()}
    for cache in (
        caches.values()
    ):  # pages that were never written are all the same page of zeros, and that stays in the CPU's cache
        for value in cache.values.values():
            value.update_inplace(np.full(value.shape(), 0.01, np.float32))
    read = bandwidth(threads)
    times: dict[tuple[str, int], list[float]] = {(name, context): [] for name in GROUPS for context in CONTEXTS}
    for number in range(rounds + 1):  # the first one warms up
        for context in CONTEXTS:
            for name, backend in backends.items():
                cache, active = caches[name], np.ones(1, np.bool_)
                cache.lengths[:] = context
                token = np.zeros(1, np.int64)
                start = time.perf_counter()
                for _ in range(new):
                    token = np.array([int(backend.decode(cache, token, active)[0].argmax())])
                if number:
                    times[name, context].append((time.perf_counter() - start) / new)
    print(
        f"12 layers, 1024 wide, 16 heads of 64, float32, {threads} threads, medians of {rounds} rounds of {new} tokens"
    )
    print(f"memory reads at {read / 1e9:.1f} GB/s; bound: the time to read weights and cache once")
    print(
        f"{'context':>8}{'heads':>8}{'ms/token':>10}{'bound ms':>10}{'of bound':>10}{'against MHA':>13}{'bound says':>12}"
    )
    figures: dict[str, Any] = {"read_bytes_per_second": read, "cells": []}
    for context in CONTEXTS:
        base = statistics.median(times["MHA", context])
        whole = weights["MHA"] + cache_bytes(GROUPS["MHA"], context)
        for name, count in GROUPS.items():
            measured, size = statistics.median(times[name, context]), weights[name] + cache_bytes(count, context)
            bound = size / read
            row = {
                "context": context,
                "variant": name,
                "seconds": measured,
                "bound": bound,
                "speedup": base / measured,
                "speedup_bound": whole / size,
            }
            figures["cells"].append(row)
            print(
                f"{context:8}{name:>8}{measured * 1e3:10.2f}{bound * 1e3:10.2f}{bound / measured:10.0%}"
                f"{base / measured:12.2f}x{whole / size:11.2f}x"
            )
    return figures
