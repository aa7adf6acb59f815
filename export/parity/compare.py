"""Proof that a graph computes what an oracle computes: polygraphy runs it, whole and layer by layer, on feeds of every kind.

The oracle computes every sequence alone and in one go, so caches, chunks, batches and padding are all under test.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from polygraphy.comparator import Comparator

from headfold.export.exportables.facts import Facts
from headfold.export.exportables.oracle import Answer, Array, Oracle, Past, QuantizedCache, Tokens
from headfold.export.parity.doubts import Doubt, Doubts, find_doubts
from headfold.export.parity.layers import Finding, ask, judge, layer_checks, layer_feed, layer_results, unsure
from headfold.export.parity.probes import Feed, Pasts, Place, Step, make_places, make_rows, make_steps
from headfold.export.parity.report import CheckResult, LayerResult, ParityReport, agreed, compare_logits
from headfold.export.parity.runners import CachedRunner, LayersRunner, OrtRunner, Outputs, prepared
from headfold.export.parity.tolerances import Precision
from headfold.export.progress import Reporter, quiet_polygraphy
from headfold.plugins.names import HIDDEN_STATES, PARTS, cache_output, hidden_state, is_cache_output
from headfold.runtime.errors import BundleError
from headfold.runtime.weight_pages import give_back_freed


@dataclass(frozen=True)
class Subject:
    """A graph, and who knows what it should compute.

    `reference` makes the same model in a dtype: it is asked how exact PyTorch can be where the graph is out of tolerance.
    """

    path: Path  # of the ONNX file; its weights lie beside it
    facts: Facts
    precision: Precision  # of the graph
    all_logits: bool  # whether it has logits for all new tokens
    capacity: int  # positions that its caches may have
    cache: QuantizedCache | None
    oracle: Callable[[], Oracle]  # in float32, with the weights of the graph
    reference: Callable[[torch.dtype], Oracle]
    hidden_states: bool = False  # whether it has what the head is given, of all new tokens

    @property
    def windows(self) -> set[int]:
        """Of its sliding layers."""
        return {layer.window for layer in self.facts.layers if layer.window > 0}


@dataclass(frozen=True)
class Candidate:
    """What runs in place of the graph in ONNX Runtime: how to open it, and how it computes.

    `open` is given the tokens a sequence will have, and returns a runner that has the residual stream (`hidden_states.{i}`) too.
    """

    open: Callable[[int], CachedRunner]
    precision: Precision
    title: str


@dataclass(frozen=True)
class _Questions:
    """What was asked, and what the oracle says."""

    name: str
    rows: Sequence[Tokens]
    steps: Sequence[Step]
    places: Sequence[Place]
    pasts: Pasts
    answers: Sequence[Answer]  # of the rows
    alone: Sequence[Sequence[Answer]]  # of the places' rows
    prompt: int  # tokens of the first row that are given; the others are the oracle's own choice
    others: Sequence[CheckResult]


@dataclass(frozen=True)
class _Outputs:
    """What the graph gave: of each step; of its layers, cut apart, at each place; and of each step in its own 16-bit arithmetic."""

    whole: Sequence[Outputs]
    layers: Sequence[Outputs] | None
    narrow: Sequence[Outputs] | None


def verify_graph(
    subject: Subject,
    prompts: Sequence[Tokens],
    decode_steps: int,
    reporter: Reporter,
    candidate: Candidate | None = None,
    also: Callable[[Oracle], Iterable[CheckResult]] = lambda oracle: (),
) -> ParityReport:
    """Compare a graph with its oracle.

    Args:
        subject: the graph. Its oracle is done and freed before ONNX Runtime starts.
        prompts: token ids; the first is also decoded and chunked, all of them make the ragged batch.
        decode_steps: tokens decoded, those that the oracle likes best; 0 or less for none.
        reporter: is told what goes on.
        candidate: what to run in place of the graph in ONNX Runtime.
        also: more to ask the oracle while it is there.
    """
    with quiet_polygraphy():
        with reporter.step("run the oracle"):
            asked = _ask(subject, prompts, max(decode_steps, 0), also)
        give_back_freed()
        capacity = max(map(len, asked.rows)) + 1
        if candidate is not None:
            with reporter.step(f"run {candidate.title}"):
                actual = _run(candidate.open(capacity), (step.feed for step in asked.steps))
            return _report(candidate.precision, asked, subject, _Outputs(actual, None, None))
        outputs = _run_onnxruntime(subject, asked, capacity, reporter)
    give_back_freed()
    precision = dataclasses.replace(subject.precision, dtype="float32")
    report = _report(precision, asked, subject, outputs)
    if not report.passed and all(check.passed for check in asked.others):
        with reporter.step("out of tolerance: see how exact PyTorch can be"):
            report = _report(precision, asked, subject, outputs, _doubts(subject, asked))
    return report


def _run_onnxruntime(subject: Subject, asked: _Questions, capacity: int, reporter: Reporter) -> _Outputs:
    """All of it in float32 arithmetic; a float16 graph also as it is."""

    def steps() -> Iterator[Feed]:
        return (step.feed for step in asked.steps)

    wide = prepared(subject.path, subject.precision, widen=True)
    with reporter.step("run ONNX Runtime in float32"), wide as graph:
        actual = _run(OrtRunner(graph.open, capacity), steps())
        feeds = (layer_feed(place, asked.pasts, told) for place, told in zip(asked.places, asked.alone, strict=True))
        layers = _run(LayersRunner(graph.open_layers), feeds)
    if subject.precision.dtype != "float16":
        return _Outputs(actual, layers, None)
    own = prepared(subject.path, subject.precision, widen=False)
    with reporter.step("run ONNX Runtime in float16"), own as graph:
        return _Outputs(actual, layers, _run(OrtRunner(graph.open, capacity), steps()))


def _ask(
    subject: Subject, prompts: Sequence[Tokens], decode_steps: int, also: Callable[[Oracle], Iterable[CheckResult]]
) -> _Questions:
    oracle = subject.oracle()
    rows = make_rows(prompts, decode_steps, subject.facts.vocab_size)
    rows[0] = np.concatenate([prompts[0], _greedy(oracle, prompts[0], decode_steps, subject.cache)])
    row_bytes = max(8 * heads * size for heads, size in subject.facts.cache_shapes)
    prompt = Place("a prompt", (0,), rows[0][None])
    others = make_places(subject.windows, subject.capacity, subject.facts.vocab_size, row_bytes)
    stored = subject.cache.dtype if subject.cache is not None else None
    pasts = Pasts(subject.facts.cache_shapes, [prompt, *others], subject.windows, stored)
    answers = [oracle.answer(row, cache=subject.cache) for row in rows]
    return _Questions(
        name=oracle.name,
        rows=rows,
        steps=list(make_steps(rows, prompts)),
        places=[prompt, *others],
        pasts=pasts,
        answers=answers,
        alone=[answers[:1], *ask(oracle, others, pasts, subject.cache)],
        prompt=len(prompts[0]),
        others=list(also(oracle)),
    )


def _greedy(oracle: Oracle, prompt: Tokens, count: int, cache: QuantizedCache | None) -> Tokens:
    """The tokens that the oracle likes best, one after the other."""
    tokens: list[int] = []
    new, past = prompt, None
    for _ in range(count):
        answer = oracle.answer(new, past, cache=cache)
        tokens.append(int(answer.logits[-1].argmax()))
        pairs = [(torch.from_numpy(keys), torch.from_numpy(values)) for keys, values in answer.cache]
        if past is not None:
            pairs = [
                (torch.cat((a, c), 1), torch.cat((b, d), 1)) for (a, b), (c, d) in zip(past.layers, pairs, strict=True)
            ]
        new, past = np.array(tokens[-1:]), Past(pairs)
    return np.array(tokens, np.int64)


def _doubts(subject: Subject, asked: _Questions) -> Doubts:
    return find_doubts(
        subject.reference,
        lambda reference: [reference.answer(row, cache=subject.cache) for row in asked.rows],
        lambda reference: ask(reference, asked.places, asked.pasts, subject.cache, asked.alone),
        subject.precision.dtype == "float16",
    )


def _run(runner: Any, feeds: Iterable[Feed]) -> list[Outputs]:
    """Everything that polygraphy's runner gives.

    Raises:
        BundleError: ONNX Runtime, or what runs in its place, cannot run the graph.
    """
    try:
        results = Comparator.run([runner], data_loader=feeds, use_subprocess=False)
    except (RuntimeException, Fail, InvalidArgument) as error:
        raise BundleError(f"ONNX Runtime cannot run it: {error}", fix="Export it again.") from error
    return list(results[0][1])


def _report(
    precision: Precision,
    asked: _Questions,
    subject: Subject,
    outputs: _Outputs,
    doubts: Doubts | None = None,
) -> ParityReport:
    """Compare everything that was run."""
    actual, layers, narrow = outputs.whole, outputs.layers, outputs.narrow
    whole = doubts.whole if doubts is not None else None
    checks = [*asked.others, *_whole_checks(precision, asked, subject, actual, whole)]
    greedy, divergent = _greedy_check(asked, actual, precision, whole)
    checks.append(greedy)
    if layers is not None:
        findings: list[Finding] = []
        alone = unsure(doubts.alone, precision.margin) if doubts is not None else None
        for number, place in enumerate(asked.places):
            findings += judge(place, asked.alone[number], layers[number], precision, alone)
        checks += layer_checks(findings)
        results = layer_results(findings, len(subject.facts.cache_shapes))
    else:
        results = _exposed(precision, asked.answers[0], asked.prompt, actual[0])
        checks.append(_exposed_check(results))
    if narrow is not None:
        loose = _whole_checks(subject.precision, asked, subject, narrow, doubts.narrow if doubts is not None else None)
        checks += [dataclasses.replace(check, name=f"{check.name}, in float16") for check in loose]
    return ParityReport(
        precision=subject.precision if layers is not None else precision,
        oracle=asked.name,
        checks=checks,
        layers=results,
        greedy_tokens=len(asked.rows[0]) - asked.prompt,
        first_divergent_token=divergent,
        finite=all(bool(np.isfinite(answer.logits).all()) for answer in asked.answers),
    )


def _whole_checks(
    precision: Precision, asked: _Questions, subject: Subject, actual: Sequence[Outputs], doubt: Doubt | None
) -> list[CheckResult]:
    """Logits of all steps, and the caches after the last of each check, which hold all that came before."""
    checks = []
    for name in dict.fromkeys(step.check for step in asked.steps):
        pairs = [(step, outputs) for step, outputs in zip(asked.steps, actual, strict=True) if step.check == name]
        errors: dict[str, list[CheckResult]] = {"": [], ", hidden states": [], ", cache": []}
        agreements = []
        for number, (step, outputs) in enumerate(pairs):
            expected = expected_outputs(step, asked.answers, subject.all_logits, subject.hidden_states)
            unsure = _unsure(step, doubt, subject)
            last = number == len(pairs) - 1
            names = [name for name in expected if last or not is_cache_output(name)]
            both = {x: agreed(expected[x], outputs[x]) for x in names}
            expected, found = ({x: pair[side] for x, pair in both.items()} for side in (0, 1))
            limits = {x: max(precision.tolerance.limit(x, expected[x]), unsure.get(x, 0)) for x in names}
            for result in _errors(name, expected, found, limits):
                errors[_kind(result.worst)].append(result)
            agreements.append(compare_logits(expected["logits"], found["logits"]))
        cosine, kl, top1 = zip(*agreements, strict=True)
        agreement = {"cosine": min(cosine), "kl": max(kl), "top1": float(np.mean(top1))}
        checks.append(dataclasses.replace(_worst(errors.pop("")), **agreement))
        checks += [dataclasses.replace(_worst(found), name=f"{name}{kind}") for kind, found in errors.items() if found]
    return checks


def _kind(output: str) -> str:
    """Which check of a step an output belongs to."""
    return ", cache" if is_cache_output(output) else ", hidden states" if output == HIDDEN_STATES else ""


def expected_outputs(
    step: Step, answers: Sequence[Answer], all_logits: bool, hidden_states: bool = False
) -> dict[str, Array]:
    """What the oracle says of a step, as the graph should give it; zeros where nothing is defined."""
    ids, mask = step.feed["input_ids"], step.feed["attention_mask"]
    batch, length = ids.shape
    ends = [end for _, end in step.spans]
    told = [answers[row] for row in step.rows]
    logits = np.zeros((batch, length if all_logits else 1, told[0].logits.shape[1]), told[0].logits.dtype)
    for row, (answer, (begin, end)) in enumerate(zip(told, step.spans, strict=True)):
        if all_logits:
            logits[row][mask[row, -length:] == 1] = answer.logits[begin:end]
        else:
            logits[row] = answer.logits[end - 1 : end]
    expected: dict[str, Array] = {"logits": logits}
    if hidden_states:
        given = [answer.normed for answer in told if answer.normed is not None]
        expected[HIDDEN_STATES] = np.zeros((batch, length, given[0].shape[1]), logits.dtype)
        for row, (state, (begin, end)) in enumerate(zip(given, step.spans, strict=True)):
            expected[HIDDEN_STATES][row][mask[row, -length:] == 1] = state[begin:end]
    for layer in range(len(told[0].cache)):
        for part, name in enumerate(PARTS):
            heads, _, size = told[0].cache[layer][part].shape
            present = np.zeros((batch, heads, max(ends), size), told[0].cache[layer][part].dtype)
            for row, (answer, end) in enumerate(zip(told, ends, strict=True)):
                present[row, :, :end] = answer.cache[layer][part][:, :end]
            expected[cache_output(layer, name)] = present
    return expected


def _unsure(step: Step, doubt: Doubt | None, subject: Subject) -> dict[str, float]:
    """How far float32 may be off in each output of a step."""
    if doubt is None:
        return {}
    asked = subject.all_logits, subject.hidden_states
    others = [expected_outputs(step, answers, *asked) for answers in doubt.others]
    right = expected_outputs(step, doubt.right, *asked)
    margin = subject.precision.margin
    return {x: margin * max(float(np.abs(other[x] - right[x]).max(initial=0)) for other in others) for x in right}


def _errors(
    name: str, expected: dict[str, Array], actual: dict[str, Array], limits: dict[str, float]
) -> list[CheckResult]:
    """The outputs that have a limit, in their order."""
    found = []
    for output, limit in limits.items():
        errors = np.abs(expected[output] - actual[output])
        largest, mean = float(errors.max()), float(errors.mean())
        found.append(CheckResult(name, largest, mean, limit, output, bool(largest <= limit)))  # NaN is not
    return found


def _worst(results: Sequence[CheckResult]) -> CheckResult:
    """The one nearest to its limit or furthest over it, with the mean error of all."""
    worst = max(results, key=_badness)
    return dataclasses.replace(worst, mean_error=float(np.mean([result.mean_error for result in results])))


def _badness(check: CheckResult) -> float:
    ratio = check.max_error / check.limit
    return float("inf") if np.isnan(ratio) else ratio + (0 if check.passed else 1e9)


def _greedy_check(
    asked: _Questions, actual: Sequence[Outputs], precision: Precision, doubt: Doubt | None
) -> tuple[CheckResult, int | None]:
    """Whether the graph likes the same tokens best, and the first where it does not.

    Where two are so close that the errors allowed decide, either is right; in 16 bits and with quantized caches it is only reported.
    """
    first = asked.answers[0].logits[asked.prompt - 1 : -1]  # [N, V]
    steps = [o for s, o in zip(asked.steps, actual, strict=True) if s.check in {"prefill", "decode"}][: len(first)]
    chosen = np.array([outputs["logits"][0, -1].argmax() for outputs in steps], np.int64)
    wanted = asked.rows[0][asked.prompt :]
    lost = first.max(1, initial=-np.inf) - first[np.arange(len(first)), chosen]
    lost[chosen == wanted] = 0  # of NaN, too
    allowed = precision.tolerance.limit("logits", first)
    if doubt is not None:
        right = doubt.right[0].logits
        allowed = max(
            allowed, *(precision.margin * float(np.abs(other[0].logits - right).max()) for other in doubt.others)
        )
    different = np.flatnonzero(chosen != wanted)
    divergent = int(different[0]) if len(different) else None
    same = float((chosen == wanted).mean()) if len(wanted) else 1.0
    note = f"{len(wanted)} equal" if divergent is None else f"differ at token {divergent}"
    passed = precision.narrow or bool((lost <= 2 * allowed).all())
    error, mean = float(lost.max(initial=0)), float(lost.mean()) if len(lost) else 0.0
    check = CheckResult("greedy tokens", error, mean, 2 * allowed, "greedy", passed, top1=same, note=note)
    return check, divergent


def _exposed(precision: Precision, answer: Answer, prompt: int, outputs: Outputs) -> list[LayerResult]:
    """The residual stream of the first prompt after each layer, of a candidate whose layers cannot be cut apart."""
    results = []
    for layer, stream in enumerate(answer.hidden_states):
        right, actual = agreed(stream[:prompt], outputs[hidden_state(layer)][0])
        error = float(np.abs(right - actual).max())
        limit = precision.tolerance.limit(hidden_state(layer), right)
        results.append(LayerResult(layer, error, limit, bool(error <= limit)))  # NaN is not
    return results


def _exposed_check(layers: Sequence[LayerResult]) -> CheckResult:
    worst = max(layers, key=lambda x: float("inf") if np.isnan(x.max_error) else x.max_error / x.limit)
    mean = float(np.mean([layer.max_error for layer in layers]))
    passed = all(layer.passed for layer in layers)
    return CheckResult(
        "residual stream, per layer", worst.max_error, mean, worst.limit, hidden_state(worst.layer), passed
    )
