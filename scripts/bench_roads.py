"""One checkpoint exported by both roads, headfold's and transformers': memory of each export, then logits, tokens and speed.

Called by `scripts/bench.py --roads`. Each export is a process of its own, without parity; what counts is its peak resident memory,
whole, and beyond that of its imports. Speed is interleaved, and told in CPU seconds too, which a busy machine disturbs less. A model
that headfold has no table of takes the one road.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, PEAK, SLOWER = 64, 1.3, 0.03  # greedy; times the weights; as a share of road 1: issue 12


def peak_bytes() -> int:
    """The largest resident size so far: of this program alone, where `resource` would count its parent's, from before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def worker(checkpoint: str, road: str, output: str) -> None:
    """In a process of its own: import what the road needs, export, print the peaks."""
    from headfold.export.bundle.pipeline import ExportOptions, export_bundle
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.progress import Reporter

    if road == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401

        import headfold.export.exportables.transformers_road.gguf_model
        import headfold.export.exportables.transformers_road.transformers_model  # noqa: F401
    imported, start = peak_bytes(), time.process_time()
    source = open_exportable(Path(checkpoint), "transformers" if road == "transformers" else "headfold")
    opened = peak_bytes()
    export_bundle(source, Path(output), ExportOptions(verify=False), Reporter(quiet=True))
    figures = {"imported": imported, "peak": max(opened, peak_bytes()), "cpu": time.process_time() - start}
    print(json.dumps(figures))  # the largest of both: the export has Linux count anew


def exported(checkpoint: Path, road: str, output: Path, threads: int) -> dict[str, Any]:
    """What an export took: peaks in bytes, CPU seconds, and the bytes of the weights it wrote."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(checkpoint), road, str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures | {"weights": (output / "model.onnx.data").stat().st_size}


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def roads(checkpoint: Path, folder: Path, rounds: int, prompt: int, threads: int) -> dict[str, Any]:
    """Export, measure, print and return the figures."""
    import numpy as np

    from headfold.export.checkpoints.families import FAMILIES
    from headfold.export.checkpoints.gguf.header import check_header
    from headfold.runtime import load

    known = checkpoint.is_dir() or check_header(checkpoint) in {family.gguf for family in FAMILIES.values()}
    names = ("headfold", "transformers") if known else ("transformers",)
    print(f"{checkpoint.name}, float32, {threads} threads, load average {os.getloadavg()[0]:.1f}")
    figures: dict[str, Any] = {}
    for name in names:
        figures[name] = f = exported(checkpoint, name, folder / name, threads)
        beyond, whole = (f["peak"] - f["imported"]) / f["weights"], f["peak"] / f["weights"]
        print(
            f"export via {name}: peak {f['peak'] / 2**20:,.0f} MiB, {whole:.2f} x the weights; beyond the"
            f" {f['imported'] / 2**20:,.0f} MiB of imports {beyond:.2f} x (at most {PEAK}); {f['cpu']:.0f} s of CPU"
        )
    if len(names) == 1:
        return figures
    backends = {name: load(str(folder / name), threads=threads).backend for name in names}
    ids = np.random.default_rng(0).integers(100, 40000, prompt)
    caches = {name: backend.new_cache(1, prompt + TOKENS) for name, backend in backends.items()}
    active = np.ones(1, np.bool_)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    logits: dict[str, list[Any]] = {name: [] for name in names}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {n: {"prefill": [], "decode": []} for n in names}

    def step(name: str, decode: bool) -> None:
        backend, cache = backends[name], caches[name]
        if decode:
            row = backend.decode(cache, np.array(tokens[name][-1:]), active)[0]
        else:
            cache.lengths[:], tokens[name][:], logits[name][:] = 0, (), ()
            row = backend.prefill(cache, 0, ids)
        tokens[name].append(int(row.argmax()))
        logits[name].append(np.array(row))

    for number in range(rounds + 1):  # the first one warms up
        for decode in (False, *[True] * (TOKENS - 1)):
            order = names if (number + len(tokens["headfold"])) % 2 else names[::-1]
            for name in order:
                taken = timed(lambda name=name, decode=decode: step(name, decode))  # type: ignore[misc]
                if number:
                    times[name]["decode" if decode else "prefill"].append(taken)
    first, second = (logits[name] for name in names)
    same = tokens["headfold"] == tokens["transformers"]
    error = max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True)) if same else float("nan")
    largest = max(float(np.abs(a).max()) for a in first)
    print(
        f"{TOKENS} greedy tokens are {'the same' if same else 'others'}; logits differ by {error:.2g} of {largest:.3g}"
    )
    print(f"via transformers against via headfold, medians of {rounds} rounds of neighbours (at least {1 - SLOWER}):")
    for what in ("prefill", "decode"):
        pairs = list(zip(times["headfold"][what], times["transformers"][what], strict=True))
        wall, cpu = (statistics.median(a[kind] / b[kind] for a, b in pairs) for kind in (0, 1))
        speed = statistics.median(b[0] for _, b in pairs)
        figures[what] = {"wall": wall, "cpu": cpu, "seconds": speed}
        print(f"{what:>8}: {speed * 1e3:8.1f} ms, speed {wall:.3f} by the clock, {cpu:.3f} by CPU time")
    print(f"load average {os.getloadavg()[0]:.1f}")
    return figures | {"same_tokens": same, "error": error}


if __name__ == "__main__":
    worker(*sys.argv[1:])
