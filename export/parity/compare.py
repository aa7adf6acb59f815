"""Proof that an exported graph is PyTorch's: polygraphy runs both on the same feeds and compares all they give.

The oracle recomputes every sequence whole, alone and without a cache, so caches, chunks, batches and padding are all under test.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, CompareFunc, RunResults

from headfold.export.exportables.base import Oracle
from headfold.export.parity.report import (
    CheckResult,
    LayerResult,
    ParityReport,
    compare_logits,
)
from headfold.export.parity.runners import GREEDY, CachedRunner, Feed, OrtRunner, TorchRunner, feed, open_session
from headfold.export.parity.tolerances import Precision, Tolerance
from headfold.export.progress import Reporter, quiet_polygraphy
from headfold.plugins.names import hidden_state, is_cache_output

Step = tuple[str, Feed]  # the check it belongs to, and its inputs


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is compared with PyTorch: how to open it, and how it computes.

    `open` is given the tokens a sequence will have, how many to decode greedily, and whether to return the residual stream
    (`hidden_states.{i}`) too.
    """

    open: Callable[[int, int, bool], CachedRunner]
    precision: Precision
    title: str


def onnxruntime_candidate(path: Path, precision: Precision) -> Candidate:
    """The graph at `path` in ONNX Runtime on the CPU."""

    def start(capacity: int, greedy: int, expose: bool) -> CachedRunner:
        return OrtRunner(lambda: open_session(path, precision, expose), capacity, greedy)

    return Candidate(start, precision, "ONNX Runtime")


def make_prompts(vocab_size: int, length: int, text: Sequence[int] | None) -> list[NDArray[np.int64]]:
    """Three prompts of different lengths: real text, where there is a tokenizer, and random tokens, the same every time."""
    random = np.random.default_rng(0).integers(0, vocab_size, (3, length))
    first = np.array(text[:length]) if text else random[0]
    return [first, random[1][: max(1, length // 3)], random[2][: max(1, 2 * length // 3)]]


def verify_graph(
    path: Path,
    load: Callable[[torch.dtype], Oracle],
    vocab_size: int,
    precision: Precision,
    all_logits: bool,
    prompts: Sequence[NDArray[np.int64]],
    decode_steps: int,
    reporter: Reporter,
    candidate: Candidate | None = None,
) -> ParityReport:
    """Compare the graph at `path` with an oracle.

    Args:
        path: of the ONNX file; its weights lie beside it.
        load: makes the oracle, in float32 or float64 arithmetic. PyTorch is done and freed before ONNX Runtime starts.
        vocab_size: of the model.
        precision: how the graph computes: picks the tolerance.
        all_logits: whether the graph has logits for all new tokens.
        prompts: token ids; the first is also decoded and chunked, all of them make the ragged batch.
        decode_steps: tokens decoded, teacher-forced and greedily; 0 or less for none.
        reporter: is told what goes on.
        candidate: what to run in place of the graph at `path` in ONNX Runtime.
    """
    candidate = candidate or onnxruntime_candidate(path, precision)
    precision = candidate.precision
    steps = list(feed_steps(prompts, max(decode_steps, 0), vocab_size))
    capacity = max(feed["attention_mask"].shape[1] for _, feed in steps) + max(decode_steps, 1)
    feeds = [inputs for _, inputs in steps]
    greedy = max(decode_steps, 1)
    with quiet_polygraphy():
        oracle = TorchRunner(lambda: load(torch.float32), all_logits, greedy)
        with reporter.step("run PyTorch"):
            expected = Comparator.run([oracle], data_loader=feeds, use_subprocess=False)
        with reporter.step(f"run {candidate.title}"):
            runner = candidate.open(capacity, greedy, False)
            actual = Comparator.run([runner], data_loader=feeds, use_subprocess=False)
            layered = candidate.open(capacity, 0, True)
            layers = Comparator.run([layered], data_loader=feeds[:1], use_subprocess=False)
        results = list(expected[0][1]), list(actual[0][1]), layers[0][1][0]
        with reporter.step("compare"):
            report = _report(precision, [name for name, _ in steps], *results)
        if not report.passed and precision.in_float32:
            exact = TorchRunner(lambda: load(torch.float64), all_logits, 0)
            with reporter.step("out of tolerance: run PyTorch in float64, to see how exact its float32 is"):
                truth = Comparator.run([exact], data_loader=feeds, use_subprocess=False)
            report = _report(precision, [name for name, _ in steps], *results, list(truth[0][1]))
    return report


def _report(
    precision: Precision,
    names: Sequence[str],
    expected: Sequence[Any],
    actual: Sequence[Any],
    layers: Any,
    exact: Sequence[Any] | None = None,
) -> ParityReport:
    """Compare the iterations, which belong to the checks `names`; `exact` are the oracle's in float64."""
    allowed, checks = precision.tolerance, []
    iterations = list(zip(expected, actual, exact or [None] * len(names), strict=True))
    for name in dict.fromkeys(names):
        checks += _check(name, [triple for n, triple in zip(names, iterations, strict=True) if n == name], allowed)
    tokens, divergent = (expected[0][GREEDY], actual[0][GREEDY]), None
    if (tokens[0] != tokens[1]).any():
        divergent = int(np.flatnonzero(tokens[0] != tokens[1])[0])
    checks.append(_greedy_check(*tokens, divergent, precision))
    hidden = _layers(expected[0], layers, exact[0] if exact else None, allowed)
    checks.append(_layer_check(hidden))
    return ParityReport(precision, checks, hidden, len(tokens[0]), divergent)


def feed_steps(prompts: Sequence[NDArray[np.int64]], decode_steps: int, vocab_size: int) -> Iterator[Step]:
    """All feeds in order; see the docstrings of `verify_graph` and the runners."""
    forced = np.random.default_rng(1).integers(0, vocab_size, (len(prompts), decode_steps))
    prompt = prompts[0][None]  # [1, P]
    yield "prefill", feed(prompt, np.ones_like(prompt))
    for i in range(decode_steps):
        yield "decode", feed(forced[:1, i : i + 1], np.ones((1, prompt.shape[1] + i + 1), np.int64))
    third = prompt.shape[1] // 3
    for begin, end in (
        (0, third),
        (third, third + 1),
        (third + 1, prompt.shape[1]),
    ):  # uneven on purpose, one of a single token
        if end > begin:
            yield "chunked prefill", feed(prompt[:, begin:end], np.ones((1, end), np.int64))
    for side in ("right", "left"):
        ids, mask = pad(prompts, side)
        name = f"ragged batch, {side} padding"
        yield name, feed(ids, mask)
        for i in range(min(2, decode_steps)):
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
            yield name, feed(forced[:, i : i + 1], mask)


def pad(prompts: Sequence[NDArray[np.int64]], side: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [B, longest], padded with token 0 on one side."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def _limit(tolerance: Tolerance, output: str, expected: Any, exact: Any | None) -> float:
    """What is allowed in this output; where the model itself is worse conditioned than that, twice the error of PyTorch's float32."""
    limit = tolerance.limit(output, expected[output])
    return limit if exact is None else max(limit, 2 * float(np.abs(expected[output] - exact[output]).max()))


def _check(name: str, triples: Sequence[tuple[Any, Any, Any]], tolerance: Tolerance) -> list[CheckResult]:
    """The iterations of one check: the logits of all of them, and the caches after the last, which hold all that came before."""
    caches = [output for output in triples[-1][0] if is_cache_output(output)]
    errors = _errors(name, *triples[-1], ["logits", *caches], tolerance)
    logits, cache = errors[:1], errors[1:]
    for triple in triples[:-1]:
        logits += _errors(name, *triple, ["logits"], tolerance)
    agreements = [compare_logits(expected["logits"], actual["logits"]) for expected, actual, _ in triples]
    cosine, kl, top1 = zip(*agreements, strict=True)
    agreement = {"cosine": min(cosine), "kl": max(kl), "top1": float(np.mean(top1))}
    return [dataclasses.replace(_worst(logits), **agreement), dataclasses.replace(_worst(cache), name=f"{name}, cache")]


def _errors(
    name: str, expected: Any, actual: Any, exact: Any | None, outputs: list[str], tolerance: Tolerance
) -> list[CheckResult]:
    """Polygraphy's comparison of some outputs of one iteration, in their order."""
    limits = {output: _limit(tolerance, output, expected, exact) for output in outputs}
    results = _compare(expected, actual, limits)
    found = []
    for output in outputs:
        result = results[output]
        passed = bool(result) and bool(np.isfinite(actual[output]).all())
        error = result.max_absdiff if passed or np.isfinite(result.max_absdiff) else float("nan")
        found.append(CheckResult(name, error, float(result.mean_absdiff), limits[output], output, passed))
    return found


def _worst(results: Sequence[CheckResult]) -> CheckResult:
    """The one nearest to its limit or furthest over it, with the mean error of all."""
    worst = max(results, key=_badness)
    return dataclasses.replace(worst, mean_error=float(np.mean([result.mean_error for result in results])))


def _badness(check: CheckResult) -> float:
    ratio = check.max_error / check.limit
    return float("inf") if np.isnan(ratio) else ratio + (0 if check.passed else 1e9)


def _compare(expected: Any, actual: Any, limits: dict[str, float]) -> Any:
    """Polygraphy's comparison of two iterations; only the outputs that have a limit."""
    names = list(limits)
    compare = CompareFunc.simple(check_error_stat="max", atol=limits, rtol=0.0)
    runs = []
    for name, iteration in (("pytorch", expected), ("candidate", actual)):
        chosen = OrderedDict((n, iteration[n]) for n in names)
        runs.append((name, [type(iteration)(chosen, runner_name=name)]))
    accuracy = Comparator.compare_accuracy(RunResults(runs), compare_func=compare)
    return next(iter(accuracy[0].values()))[0]  # one pair of runners, one iteration


def _greedy_check(
    expected: NDArray[np.int64], actual: NDArray[np.int64], divergent: int | None, precision: Precision
) -> CheckResult:
    """Tokens are equal or not. In 16 bits near-ties may fall the other way, and everything after differs: reported, not failed."""
    same = float((expected == actual).mean())
    note = f"{len(expected)} equal" if divergent is None else f"differ from token {divergent}"
    passed = divergent is None or precision.narrow
    return CheckResult(
        "greedy tokens", float(divergent is not None), 1 - same, 0.0, GREEDY, passed, top1=same, note=note
    )


def _layers(expected: Any, actual: Any, exact: Any | None, tolerance: Tolerance) -> list[LayerResult]:
    results: list[LayerResult] = []
    while (name := hidden_state(layer := len(results))) in expected:
        error = float(np.abs(expected[name] - actual[name]).max())
        limit = _limit(tolerance, name, expected, exact)
        results.append(LayerResult(layer, error, limit, bool(error <= limit)))  # NaN is not
    return results


def _layer_check(layers: Sequence[LayerResult]) -> CheckResult:
    worst = max(layers, key=lambda x: float("inf") if np.isnan(x.max_error) else x.max_error / x.limit)
    mean = float(np.mean([layer.max_error for layer in layers]))
    name = hidden_state(worst.layer)
    return CheckResult(
        "residual stream, per layer", worst.max_error, mean, worst.limit, name, all(x.passed for x in layers)
    )
