#!/usr/bin/env python3
"""Speed and memory of generation, side by side: headfold, onnxruntime-genai (its own builder's model) and PyTorch eager.

Each contender is a process of its own, kept warm; rounds are interleaved, so that a noisy machine hits all alike, and only medians
and their ratios are told. headfold and onnxruntime-genai share one environment, so one build of onnxruntime. This process stays
small: Linux counts the peak memory of a parent as its children's. Run it as `scripts/bench`, which makes the environments.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bundles" / "bench"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
Result = dict[str, float]
Run = Callable[[list[int], int], tuple[float, float]]  # prompt ids, new tokens: seconds of prefill, seconds of the rest


def headfold(path: str, threads: int) -> Run:
    import numpy as np

    from headfold.runtime import load

    backend = load(path, threads=threads).backend

    def run(ids: list[int], new: int) -> tuple[float, float]:
        cache, active = backend.new_cache(1, len(ids) + new), np.ones(1, np.bool_)
        start = time.perf_counter()
        token = backend.prefill(cache, 0, np.array(ids)).argmax()
        middle = time.perf_counter()
        for _ in range(new - 1):
            token = backend.decode(cache, np.array([token]), active)[0].argmax()
        return middle - start, time.perf_counter() - middle

    return run


def genai(path: str, threads: int) -> Run:
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(ids: list[int], new: int) -> tuple[float, float]:
        parameters = og.GeneratorParams(model)
        length = len(ids) + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle

    return run


def torch_eager(path: str, threads: int) -> Run:
    import torch

    from headfold.export.checkpoint import load_decoder, open_checkpoint

    torch.set_num_threads(threads)
    decoder = load_decoder(open_checkpoint(Path(path)))

    @torch.inference_mode()
    def run(ids: list[int], new: int) -> tuple[float, float]:
        cache, total = decoder.new_cache(1, len(ids) + new), len(ids)
        start = time.perf_counter()
        token = decoder(torch.tensor([ids]), None, cache, last_only=True).logits[0, -1].argmax()
        middle = time.perf_counter()
        for _ in range(new - 1):
            total += 1
            token = (
                decoder(token.view(1, 1), torch.ones(1, total, dtype=torch.long), cache, True).logits[0, -1].argmax()
            )
        return middle - start, time.perf_counter() - middle

    return run


def worker(kind: str, path: str, threads: int) -> None:
    """Serve rounds: a line of JSON in, a line of JSON out."""
    run = KINDS[kind](path, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        prefill, decode = run(task["ids"], task["new"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"prefill": prefill, "decode": decode, "peak": peak}), flush=True)


class Contender:
    """A worker process."""

    def __init__(self, kind: str, python: Path, path: Path, threads: int) -> None:
        command = [str(python), __file__, "--worker", kind, str(path), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.results: list[Result] = []
        self._read()

    def round(self, ids: list[int], new: int, keep: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
        self.process.stdin.flush()
        result = self._read()
        if keep:
            self.results.append(result)

    def median(self, name: str) -> float:
        return statistics.median(result[name] for result in self.results)

    def _read(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contender ended; its error is above")
        return dict(json.loads(line))


def reader(threads: int) -> Callable[[], float]:
    """A function that reads 1 GiB, larger than any cache, and returns the seconds it took."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)

    def read() -> float:
        start = time.perf_counter()
        data.sum()
        return time.perf_counter() - start

    return read


def memory(_: str, threads: int) -> Run:
    read = reader(threads)
    return lambda ids, new: (read(), 0.0)


def bandwidth(threads: int) -> float:
    """Bytes per second this machine reads from memory: the median of seven times."""
    read = reader(threads)
    return (1 << 30) / statistics.median(read() for _ in range(7))


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed; its error is above")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def exports() -> Iterator[tuple[str, float, float]]:
    """Make both models anew; wall seconds and peak bytes of each."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    save = (
        "import sys, torch; from pathlib import Path; from headfold.export.checkpoint import open_checkpoint;"
        "from headfold.export.hf import save_hf;"
        "save_hf(Path(sys.argv[2]), open_checkpoint(Path(sys.argv[1])), torch.float32)"
    )
    measured([sys.executable, "-c", save, str(GGUF), str(WORK / "hf")])
    headfold_command = str(Path(sys.executable).parent / "headfold")
    arguments = ["export", str(WORK / "hf"), "-o", str(WORK / "headfold"), "--quiet"]
    yield "headfold, without parity", *measured([headfold_command, *arguments, "--no-verify"])
    build = (
        f"import sys, runpy; sys.path.append({sysconfig.get_path('purelib')!r});"  # torch and transformers are there
        f"sys.argv = ['builder', '-i', {str(WORK / 'hf')!r}, '-o', {str(WORK / 'genai')!r}, '-p', 'fp32', '-e', 'cpu',"
        f" '-c', {str(WORK / 'cache')!r}, '--extra_options', 'prune_lm_head=true'];"
        "runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__')"
    )
    yield "onnxruntime-genai's builder", *measured([str(PEERS), "-c", build])
    yield "headfold, with parity", *measured([headfold_command, *arguments, "--force"])


KINDS = {"headfold": headfold, "onnxruntime-genai": genai, "torch eager": torch_eager, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--skip-export", action="store_true", help="use the models of the last run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--groups", action="store_true", help="instead: MHA, GQA and MQA variants of a larger random model"
    )
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, options.threads)
        return
    if options.groups:
        sys.path.insert(0, str(Path(__file__).parent))
        from bench_groups import groups

        table = groups(ROOT / "bundles" / "groups", options.rounds, min(options.new, 16), options.threads, bandwidth)
        if options.json:
            options.json.write_text(json.dumps(table, indent=2) + "\n")
        return
    figures: dict[str, Any] = {"threads": options.threads, "prompt": options.prompt, "new": options.new}
    if not options.skip_export:
        for name, seconds, peak in exports():
            print(f"export with {name}: {seconds:.1f} s, peak memory {peak / 2**20:,.0f} MiB")
            figures[f"export: {name}"] = {"seconds": seconds, "peak_bytes": peak}
    generation(options, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def generation(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Interleaved rounds, then the table."""
    ours = Path(sys.executable)
    reads = Contender("memory", ours, WORK, options.threads)
    contenders = {
        "headfold": Contender("headfold", PEERS, WORK / "headfold", options.threads),
        "onnxruntime-genai": Contender("onnxruntime-genai", PEERS, WORK / "genai", options.threads),
        "torch eager": Contender("torch eager", ours, WORK / "hf", options.threads),
    }
    ids = random.Random(0).choices(range(100, 40000), k=options.prompt)
    for number in range(options.rounds + 1):  # the first one warms up
        order = [*contenders.values()]
        turn = number % len(order)  # each is first, and after each of the others, equally often
        for contender in (reads, *order[turn:], *order[:turn]):
            contender.round(ids, options.new, keep=number > 0)
    base = contenders["onnxruntime-genai"]
    weights = (WORK / "headfold" / "model.onnx.data").stat().st_size
    kv = (
        2 * 30 * 3 * 64 * 4 * (options.prompt + options.new / 2)
    )  # bytes of SmolLM2's cache that a step reads, on average
    read = (1 << 30) / reads.median("prefill")
    bound = read / (weights + kv)  # tokens per second if reading memory were all there is to do
    print(
        f"{options.threads} threads, prompt {options.prompt}, {options.new} new tokens, medians of {options.rounds} rounds"
    )
    print(f"memory reads at {read / 1e9:.1f} GB/s, which bounds decode at {bound:.1f} tokens/s")
    columns = (
        f"{'prefill tok/s':>15}{'ratio':>8}{'decode tok/s':>15}{'ratio':>8}{'of bound':>10}{'peak MiB':>10}{'ratio':>8}"
    )
    print(f"{'':20}{columns}")
    for name, contender in contenders.items():
        prefill, decode = options.prompt / contender.median("prefill"), (options.new - 1) / contender.median("decode")
        peak = contender.median("peak")
        ratios = (
            base.median("prefill") / contender.median("prefill"),
            base.median("decode") / contender.median("decode"),
        )
        share = peak / base.median("peak")
        print(
            f"{name:20}{prefill:15.1f}{ratios[0]:8.3f}{decode:15.1f}{ratios[1]:8.3f}"
            f"{decode / bound:10.0%}{peak / 2**20:10,.0f}{share:8.3f}"
        )
        figures[name] = {"prefill": prefill, "decode": decode, "peak_bytes": peak, "ratios": [*ratios, share]}
    figures["read_bytes_per_second"], figures["decode_bound"] = read, bound
    for contender in (reads, *contenders.values()):
        contender.process.kill()


if __name__ == "__main__":
    main()
