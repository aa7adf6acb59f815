#!/usr/bin/env python3
"""Speed and memory of generation, side by side: headfold, onnxruntime-genai (its own builder's model) and PyTorch eager.

Each contender is a process of its own, kept warm; rounds are interleaved, so that a noisy machine hits all alike, and only medians
and their ratios are told. headfold and onnxruntime-genai share one environment, so one build of onnxruntime. This process stays
small: Linux counts the peak memory of a parent as its children's. Run it as `scripts/bench`, which makes the environments.
"""

import argparse
import itertools
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
from operator import truediv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bundles" / "bench"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SLICE = 16  # tokens decoded before the next contender's turn
Generation = Iterator[None]  # each step does something: the first one the prefill, every other one token
Start = Callable[[list[int], int], Generation]  # of prompt ids and the most new tokens


def headfold(path: str, threads: int) -> Start:
    import numpy as np

    from headfold.runtime import load

    backend = load(path, threads=threads).backend

    def start(ids: list[int], new: int) -> Generation:
        cache, active = backend.new_cache(1, len(ids) + new), np.ones(1, np.bool_)
        token = backend.prefill(cache, 0, np.array(ids)).argmax()
        while True:
            yield
            token = backend.decode(cache, np.array([token]), active)[0].argmax()

    return start


def genai(path: str, threads: int) -> Start:
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def start(ids: list[int], new: int) -> Generation:
        parameters = og.GeneratorParams(model)
        length = len(ids) + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        while True:
            generator.generate_next_token()
            yield

    return start


def torch_eager(path: str, threads: int) -> Start:
    import torch

    from headfold.export.checkpoints.opening import load_decoder, open_checkpoint

    torch.set_num_threads(threads)
    decoder = load_decoder(open_checkpoint(Path(path)))

    @torch.inference_mode()
    def step(ids: torch.Tensor, total: int, cache: Any) -> torch.Tensor:
        mask = torch.ones(1, total, dtype=torch.long)
        return decoder(ids, mask, cache, last_only=True).logits[0, -1].argmax().view(1, 1)

    def start(ids: list[int], new: int) -> Generation:
        cache = decoder.new_cache(1, len(ids) + new)
        total = len(ids)
        token = step(torch.tensor([ids]), total, cache)
        while True:
            yield
            total += 1
            token = step(token, total, cache)

    return start


def worker(kind: str, path: str, threads: int) -> None:
    """Serve tasks: a line of JSON in, a line of JSON out, with the seconds that the task took."""
    start = KINDS[kind](path, threads)
    print(json.dumps({"ready": True}), flush=True)
    generation: Generation = iter(())
    for line in sys.stdin:
        task = json.loads(line)
        if "ids" in task:  # a new prompt
            generation = start(task["ids"], task["new"])
        begin = time.perf_counter()
        for _ in range(task["steps"]):
            next(generation)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


class Contender:
    """A worker process, and what it measured: seconds of a prefill, seconds of a slice of decoding, peak bytes."""

    def __init__(self, kind: str, python: Path, path: Path, threads: int) -> None:
        command = [str(python), __file__, "--worker", kind, str(path), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.prefills: list[float] = []
        self.slices: list[float] = []
        self.peak = 0.0
        self._read()

    def prefill(self, ids: list[int], new: int, keep: bool) -> None:
        seconds = self._do({"ids": ids, "new": new, "steps": 1})
        if keep:
            self.prefills.append(seconds)

    def decode(self, keep: bool) -> None:
        seconds = self._do({"steps": SLICE})
        if keep:
            self.slices.append(seconds)

    def _do(self, task: dict[str, Any]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        result = self._read()
        self.peak = float(result["peak"])
        return float(result["seconds"])

    def _read(self) -> dict[str, Any]:
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


def memory(_: str, threads: int) -> Start:
    read = reader(threads)

    def start(ids: list[int], new: int) -> Generation:
        while True:
            read()
            yield

    return start


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
        "import sys, torch; from pathlib import Path; from headfold.export.checkpoints.opening import open_checkpoint;"
        "from headfold.export.checkpoints.hf_writer import save_hf;"
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
    parser.add_argument("--experts", action="store_true", help="instead: memory of a mixture of experts")
    parser.add_argument("--roads", action="store_true", help="instead: one checkpoint exported by both roads")
    parser.add_argument("--checkpoint", type=Path, default=GGUF, help="of --roads; by default SmolLM2's GGUF file")
    parser.add_argument("--speculation", action="store_true", help="instead: what guessing tokens saves and costs")
    parser.add_argument("--draft", action="store_true", help="of --speculation: SmolLM2 int4 guesses, too")
    parser.add_argument(
        "--peers",
        choices=["smollm2", "smollm2-trained", "random-1b", "subject"],
        help="instead: small weights beside other engines', of this model; with --rounds 0 what they weigh and cost alone",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of --peers: 'int4' also stands for 'headfold int4'")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, options.threads)
        return
    if options.groups or options.experts or options.roads or options.speculation or options.peers:
        sys.path.insert(0, str(Path(__file__).parent))
        from bench_experts import experts
        from bench_groups import groups
        from bench_roads import roads

        bundles, threads = ROOT / "bundles", options.threads
        table: Any
        if options.experts:
            table = experts(bundles, threads)
        elif options.roads:
            path = bundles / "roads" / options.checkpoint.stem
            table = roads(options.checkpoint, path, options.rounds, options.prompt, threads)
        elif options.speculation:
            from bench_speculation import speculation

            table = speculation(bundles / "speculation", GGUF, options.rounds, options.new, threads, options.draft)
        elif options.peers:
            from bench_peers import peers

            lengths = (32, 512, 2048)
            folder, new, read = bundles / "peers", min(options.new, 32), bandwidth(threads)
            table = peers(folder, options.rounds, new, threads, lengths, options.peers, read, options.only)
        else:
            table = groups(bundles / "groups", options.rounds, min(options.new, 16), threads, bandwidth)
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


def rotated(contenders: list[Contender], turn: int) -> list[Contender]:
    """Each is first, and after each of the others, equally often."""
    turn %= len(contenders)
    return [*contenders[turn:], *contenders[:turn]]


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
        turns = itertools.count(number)
        for contender in rotated([reads, *contenders.values()], next(turns)):
            contender.prefill(ids, options.new + 1, keep=number > 0)
        for _ in range(options.new // SLICE):  # in slices, so that what disturbs the machine for seconds hits all alike
            for contender in rotated([*contenders.values()], next(turns)):
                contender.decode(keep=number > 0)
    base = contenders["onnxruntime-genai"]
    weights = (WORK / "headfold" / "model.onnx.data").stat().st_size
    kv = 2 * 30 * 3 * 64 * 4 * (options.prompt + options.new / 2)  # bytes of SmolLM2's cache that a step reads
    read = (1 << 30) / statistics.median(reads.prefills)
    bound = read / (weights + kv)  # tokens per second if reading memory were all there is to do
    size = f"prompt {options.prompt}, {options.new} new tokens in turns of {SLICE}"
    print(f"{options.threads} threads, {size}, medians of {options.rounds} rounds; ratios are medians of each turn's")
    print(f"memory reads at {read / 1e9:.1f} GB/s, which bounds decode at {bound:.1f} tokens/s")
    columns = (
        f"{'prefill tok/s':>15}{'ratio':>8}{'decode tok/s':>15}{'ratio':>8}{'of bound':>10}{'peak MiB':>10}{'ratio':>8}"
    )
    print(f"{'':20}{columns}")
    for name, contender in contenders.items():
        prefill = options.prompt / statistics.median(contender.prefills)
        decode = SLICE / statistics.median(contender.slices)
        ratios = (
            statistics.median(map(truediv, base.prefills, contender.prefills)),  # neighbours in time
            statistics.median(map(truediv, base.slices, contender.slices)),
        )
        peak, share = contender.peak, contender.peak / base.peak
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
