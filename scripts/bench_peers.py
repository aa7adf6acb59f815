#!/usr/bin/env python3
"""Small weights beside other engines': headfold, onnxruntime-genai's int4, llama.cpp's Q4_0 and Q8_0, OpenVINO GenAI reading Q4_0.

Loading, prompts of several lengths, decoding alone and eight at once, peak memory, and how far the next token's distribution is from
float32's. Each is a process of its own, kept warm; rounds are interleaved and medians told. Called by `scripts/bench.py --peers`.
"""

import importlib
import itertools
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
EXPORTS = {  # options of headfold export, beside --max-kl
    "float32": (),
    "int8": ("--weights", "int8"),
    "int4": ("--weights", "int4"),
    "int4-128": ("--weights", "int4", "--block-size", "128"),
    "mixed6": ("--weights", "mixed", "--bits", "6"),
    "mixed5": ("--weights", "mixed", "--bits", "5"),
    "mixed4.5": ("--weights", "mixed", "--bits", "4.5"),  # nearly the bytes of onnxruntime-genai's int4
    "mixed4": ("--weights", "mixed", "--bits", "4"),  # head and all, as onnxruntime-genai's int4
    "mixed4-128": ("--weights", "mixed", "--bits", "4", "--block-size", "128"),
    "mixed4-128-kv8": ("--weights", "mixed", "--bits", "4", "--block-size", "128", "--kv-cache", "int8"),
    "w8a8": ("--weights", "w8a8"),
}
PAIRS = {f"w8a8+{name}": ("w8a8", name) for name in ("int4-128", "mixed4-128", "mixed4-128-kv8")}
BATCH, SHORT = 8, 32  # sequences that are decoded at once, and the tokens of their prompts
_SETTLE = 0.3  # seconds: threads of the engine before still wait for work in a loop, and took a short prompt 15 ms
PREFIXES = 256  # of a text, whose next tokens' distributions are compared; of a random model some: its text is none
Logits = NDArray[np.float32]
Timed = tuple[float, float]  # seconds of the prompts, up to the first tokens, and of all tokens behind them


class Headfold:
    """The runtime, greedy; `prefill` is another bundle for the prompts."""

    def __init__(self, path: str, threads: int, prefill: str | None = None) -> None:
        from headfold.runtime import load

        self.backend, self.pair = load(path, threads=threads, prefill=prefill).backend, prefill is not None

    def run(self, rows: list[list[int]], new: int) -> Timed:
        cache, active = self.backend.new_cache(len(rows), len(rows[0]) + new), np.ones(len(rows), np.bool_)
        start = time.perf_counter()
        tokens = np.array([self.backend.prefill(cache, row, np.array(ids)).argmax() for row, ids in enumerate(rows)])
        first = time.perf_counter()
        for _ in range(new - 1):
            tokens = self.backend.decode(cache, tokens, active).argmax(-1)
        return first - start, time.perf_counter() - first

    def logits(self, ids: list[int]) -> Logits | None:
        cache = self.backend.new_cache(1, len(ids))
        if not self.pair:
            return np.asarray(self.backend.prefill(cache, 0, np.array(ids)))
        self.backend.prefill(cache, 0, np.array(ids[:-1]))  # all tokens of an answer but its first are decoded
        return self.backend.decode(cache, np.array(ids[-1:]), np.ones(1, np.bool_))[0].copy()


class Genai:
    """onnxruntime-genai."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.og, self.model = og, og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)  # as the others have read theirs

    def _generator(self, length: int, batch: int = 1) -> Any:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        return self.og.Generator(self.model, parameters)

    def run(self, rows: list[list[int]], new: int) -> Timed:
        generator = self._generator(len(rows[0]) + new, len(rows))
        start = time.perf_counter()
        generator.append_tokens(np.array(rows, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    def logits(self, ids: list[int]) -> Logits | None:
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids)
        return np.asarray(generator.get_logits(), np.float32).reshape(-1, self._vocabulary)[-1]

    @property
    def _vocabulary(self) -> int:
        return int(json.loads(Path(self.model_path, "genai_config.json").read_text())["model"]["vocab_size"])

    model_path = ""


class LlamaCpp:
    """llama.cpp, as the package xllamacpp has it: wheels, built for AVX2."""

    def __init__(self, path: str, threads: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.warmup = path, 4096, False
        parameters.n_parallel, parameters.kv_unified = BATCH, True
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(parameters)

    def _ask(self, ids: list[int], new: int, **more: Any) -> Any:
        task = {"prompt": ids, "n_predict": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        return self.server.handle_completions(task | more)

    def run(self, rows: list[list[int]], new: int) -> Timed:
        with ThreadPoolExecutor(len(rows)) as threads:
            took = [answer["timings"] for answer in threads.map(lambda ids: self._ask(ids, new), rows)]
        return max(x["prompt_ms"] for x in took) / 1000, max(x["predicted_ms"] for x in took) / 1000

    def logits(self, ids: list[int]) -> Logits | None:
        found = self._ask(ids, 1, n_probs=1 << 20)["choices"][0]["logprobs"]
        if found is None:  # of a token that is no whole character
            return None
        found = found["content"][0]["top_logprobs"]
        logits = np.full(1 + max(entry["id"] for entry in found), -100.0, np.float32)
        for entry in found:
            logits[entry["id"]] = max(entry["logprob"], -100.0)
        return logits


class OpenVino:
    """OpenVINO GenAI, which reads GGUF files itself. It gives no logits."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, rows: list[list[int]], new: int) -> Timed:
        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        ids = np.array(rows)
        tensors = (self.openvino.Tensor(x) for x in (ids, np.ones(ids.shape, np.int64)))
        start = time.perf_counter()
        took = self.pipeline.generate(self.genai.TokenizedInputs(*tensors), config).perf_metrics
        first = took.get_ttft().mean / 1000
        return first, time.perf_counter() - start - first

    def logits(self, ids: list[int]) -> Logits | None:
        return None


ENGINES: dict[str, Callable[..., Any]] = {
    "headfold": Headfold,
    "onnxruntime-genai": Genai,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}


MODULES = {
    "headfold": ["headfold.runtime.generate", "headfold.runtime.session"],
    "onnxruntime-genai": ["onnxruntime_genai"],
    "llama.cpp": ["xllamacpp"],
    "openvino": ["openvino_genai"],
}


def worker(kind: str, path: str, threads: int, *more: str) -> None:
    """Serve tasks, a line of JSON each; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Genai.model_path = path
    start = time.perf_counter()
    for module in MODULES[kind]:
        importlib.import_module(module)
    imported = time.perf_counter()
    engine = ENGINES[kind](path, threads, *more)
    loaded = {"import": imported - start, "load": time.perf_counter() - imported}
    print(json.dumps(loaded), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "to" in task:
            rows = [engine.logits(ids) for ids in task["prefixes"]]
            given = [number for number, row in enumerate(rows) if row is not None]
            np.save(task["to"], np.stack([rows[number] for number in given]) if given else np.empty((0, 0)))
            answer: dict[str, Any] = {"given": given}
        else:
            prefill, decode = engine.run(task["rows"], task["new"])
            answer = {"prefill": prefill, "decode": decode, "peak": peak_memory()}
        print(json.dumps(answer), file=answers, flush=True)


def peak_memory() -> int:
    """This process's, in bytes (Linux); what getrusage says counts the process that forked this one, too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10


class Contender:
    """A worker process, and what it measured."""

    def __init__(self, kind: str, paths: Sequence[Path], threads: int) -> None:
        """`paths`: of its model; behind it, of one that reads prompts."""
        self._command = [str(PEERS), __file__, kind, str(paths[0]), str(threads), *map(str, paths[1:])]
        self.paths, self.kind, self.peak = paths, kind, 0.0
        self.imports: list[float] = []
        self.loads: list[float] = []  # behind the imports, tokenizer and all
        self.start(keep=False)
        self.prefills: dict[int, list[float]] = {}  # by length
        self.decodes: dict[int, list[float]] = {}  # tokens per second, by what they came behind
        self.batches: list[float] = []  # the same, of all sequences together

    def start(self, keep: bool) -> None:
        """Load; the first time the file may not be in memory yet, and nobody remembers anything of it."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        took = self._read(self.kind)
        if keep:
            self.imports.append(took["import"])
            self.loads.append(took["load"])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, rows: list[list[int]], new: int, keep: bool) -> None:
        """Prompts of one length; several are for decoding them at once, and no measure of a prompt."""
        result = self.ask({"rows": rows, "new": new})
        if not keep:
            return
        rate = len(rows) * (new - 1) / result["decode"]
        if len(rows) > 1:
            self.batches.append(rate)
            return
        self.peak = float(result["peak"])
        self.prefills.setdefault(len(rows[0]), []).append(result["prefill"])
        self.decodes.setdefault(len(rows[0]), []).append(rate)

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._read(self.paths[0].name)

    def _read(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{name} ended")
        return dict(json.loads(line))


def peers(
    folder: Path,
    rounds: int,
    new: int,
    threads: int,
    prompts: Sequence[int],
    subject: str,
    read: float,
    only: Sequence[str] | None,
) -> dict[str, Any]:
    """Make the models, measure, print the table, and return it.

    Without rounds, what they weigh and cost alone. `read` are bytes per second of memory; `only` are the contenders beside float32, all
    if None.
    """
    from bench_peers_models import CONTENDERS, models  # of the other environment: it needs torch

    if subject == "subject" and rounds:
        raise SystemExit("--peers subject: has 512 positions, too few for these prompts. Add --rounds 0.")
    wanted = [*CONTENDERS]
    if only is not None:
        wanted = ["headfold float32", *(name if name in CONTENDERS else f"headfold {name}" for name in only)]
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise SystemExit(f"--only {unknown[0]}: the contenders are {', '.join(CONTENDERS)}")
    paths = models(folder / subject, subject, wanted)
    contenders = {name: Contender(kind, paths[name], threads) for name, kind in CONTENDERS.items() if name in paths}
    random = np.random.default_rng(0)
    for number in range(rounds + 1 if rounds else 0):  # the first one warms up
        for length, count in [
            *((length, 1) for length in prompts),
            (SHORT, BATCH),
        ]:  # the last adds to what memory is held
            rows = random.integers(100, 40000, (count, length)).tolist()  # new ones: some engines remember prompts
            everyone = itertools.islice(itertools.cycle(contenders.values()), number, number + len(contenders))
            for contender in everyone:
                time.sleep(_SETTLE)
                contender.run(rows, new, keep=number > 0)
    texts = prefixes(paths["headfold float32"][0])[: 16 if subject == "random-1b" else None]
    costs = distances(contenders, texts, folder)
    for contender in contenders.values():
        contender.stop()
    for _ in range(rounds):
        for contender in contenders.values():
            contender.start(keep=True)
            contender.stop()
    cpu = next((x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?")
    table: dict[str, Any] = {"cpu": cpu, "threads": threads, "load": os.getloadavg()[1]}
    print(f"{subject}, {cpu}, {threads} threads, medians of {rounds} rounds; load of the machine {table['load']:.1f}")
    print(f"{'':28}{'MB':>8}{'KL':>9}{'top-1':>7}")
    for name, contender in contenders.items():
        size, (kl, top1) = sum(map(weight_bytes, contender.paths)), costs.get(name, (float("nan"), float("nan")))
        table[name] = {"weight_bytes": size, "kl": kl, "top1": top1}
        print(f"{name:28}{size / 1e6:8.1f}{kl:9.4f}{top1:7.0%}")
    if rounds:
        tell_speed(contenders, prompts, read, table)
    return table


def tell_speed(contenders: dict[str, Contender], prompts: Sequence[int], read: float, table: dict[str, Any]) -> None:
    """Print what they measured, and add it to the table."""
    heads = "".join(f"{f'{what} {length}':>13}" for what in ("prompt", "decode") for length in prompts)
    print(f"{'':28}{heads}{f'{BATCH} at once':>11}{'import s':>10}{'load s':>8}{'peak MiB':>10}")
    for name, contender in contenders.items():
        speeds = [length / statistics.median(contender.prefills[length]) for length in prompts]
        decodes = [statistics.median(contender.decodes[length]) for length in prompts]
        batch = statistics.median(contender.batches)
        importing, loading = statistics.median(contender.imports), statistics.median(contender.loads)
        cells = "".join(f"{speed:13.0f}" for speed in speeds) + "".join(f"{speed:13.1f}" for speed in decodes)
        print(f"{name:28}{cells}{batch:11.1f}{importing:10.2f}{loading:8.2f}{contender.peak / 2**20:10,.0f}")
        table[name] |= {
            "prefill": dict(zip(map(str, prompts), speeds, strict=True)),
            "decode": dict(zip(map(str, prompts), decodes, strict=True)),
            f"decode_{BATCH}": batch,
            "import_seconds": importing,
            "load_seconds": loading,
            "peak_bytes": contender.peak,
        }
        if contender.kind == "headfold":
            share = decodes[0] * weight_bytes(contender.paths[0]) / read
            table[name]["share_of_memory_bound"] = share
            print(f"{'':28}{share:.0%} of what memory allows, which gives {read / 1e9:.1f} GB/s", flush=True)


def weight_bytes(model: Path) -> int:
    """Of a GGUF file all, of a directory the graph's weights: what a token reads of them, where embedding and head are one."""
    return (model / "model.onnx.data" if model.is_dir() else model).stat().st_size


def prefixes(bundle: Path) -> list[list[int]]:
    """Of Python's documentation, which nothing was calibrated on; different lengths."""
    from tokenizers import Tokenizer

    topics = sorted(pydoc_data.topics.topics.values(), key=lambda topic: -len(topic))
    text = " ".join(topics[:8])
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text).ids
    return [ids[100 * number : 100 * number + 32 + number % 128] for number in range(min(PREFIXES, len(ids) // 100))]


def distances(contenders: dict[str, Contender], texts: list[list[int]], folder: Path) -> dict[str, tuple[float, float]]:
    """KL(float32 || each), nats, and the share of same likeliest tokens."""
    found, file = dict[str, tuple[float, float]](), folder / "logits.npy"
    exact = np.empty((0, 0))
    for name, contender in contenders.items():
        given = contender.ask({"prefixes": texts, "to": str(file)})["given"]
        if not given:
            continue
        logits = np.load(file).astype(np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        now = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        if not found:
            exact = now  # the first contender is float32
        right = exact[given]
        found[name] = (
            float((np.exp(right) * (right - now)).sum(1).mean()),
            float((right.argmax(1) == now.argmax(1)).mean()),
        )
    return found


def genai_builder(source: Path, output: Path, cache: Path, precision: str) -> list[str]:
    """The command that makes onnxruntime-genai's own model; torch and transformers are in this environment."""
    code = (
        f"import sys, runpy; sys.path.append({sysconfig.get_path('purelib')!r});"
        f"sys.argv = ['builder', '-i', {str(source)!r}, '-o', {str(output)!r}, '-p', {precision!r}, '-e', 'cpu',"
        f" '-c', {str(cache)!r}, '--extra_options', 'prune_lm_head=true', 'int4_accuracy_level=4'];"
        "runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__')"
    )
    return [str(PEERS), "-c", code]


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
