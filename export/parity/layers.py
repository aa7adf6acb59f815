"""Each layer alone: fed with what the oracle's layer before hands on, at every kind of position.

So no error is amplified by what comes behind it, and the first wrong layer is named rightly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headfold.export.exportables.oracle import Answer, Array, Oracle, QuantizedCache
from headfold.export.parity.doubts import Answers, Doubt
from headfold.export.parity.probes import Feed, Pasts, Place, feed
from headfold.export.parity.report import CheckResult, LayerResult, agreed
from headfold.export.parity.runners import Outputs
from headfold.export.parity.tolerances import Precision
from headfold.plugins.names import PARTS, cache_input, cache_output, hidden_state, is_cache_output, layer_input


@dataclass(frozen=True)
class Finding:
    """One tensor of one layer at one place: the element that is nearest to what it is allowed, or furthest over."""

    place: str
    layer: int  # the number of layers stands for the final norm and head
    tensor: str
    error: float
    limit: float
    mean: float

    @property
    def passed(self) -> bool:
        """NaN is not."""
        return bool(self.error <= self.limit)

    @property
    def badness(self) -> float:
        """Errors in units of what is allowed."""
        if np.isnan(self.error):
            return float("inf")
        return self.error / self.limit if self.limit else float(self.error > 0) * 1e30


def ask(
    oracle: Oracle,
    places: Sequence[Place],
    pasts: Pasts,
    cache: QuantizedCache | None,
    given: Sequence[Answers] | None = None,
) -> list[list[Answer]]:
    """An oracle's answers at each place, row by row; `given` are the answers whose residual streams each layer reads."""
    answers = []
    for number, place in enumerate(places):
        rows = []
        for row, length in enumerate(place.pasts):
            streams = given[number][row].hidden_states if given is not None else None
            past = pasts.before(length) if length else None
            rows.append(oracle.answer(place.tokens[row], past, streams, cache))
        answers.append(rows)
    return answers


def layer_feed(place: Place, pasts: Pasts, answers: Answers) -> Feed:
    """Inputs of the graph whose layers are cut apart (`split_layers`)."""
    batch, length = place.tokens.shape
    total = max(place.pasts) + length
    mask = np.zeros((batch, total), np.int64)
    for row, past in enumerate(place.pasts):
        mask[row, :past] = mask[row, total - length :] = 1
    feeds = feed(place.tokens, mask)
    made: dict[int, Array] = {}  # layers of equal shape have the same past
    for layer in range(len(answers[0].hidden_states)):
        for part, x in zip(PARTS, pasts.layer(layer), strict=True):
            if id(x) not in made:
                made[id(x)] = np.ascontiguousarray(
                    np.broadcast_to(x[None, :, :total].numpy(), (batch, x.shape[0], total, x.shape[2]))
                )
            feeds[cache_input(layer, part)] = made[id(x)]
        feeds[layer_input(layer + 1)] = np.stack([answer.hidden_states[layer] for answer in answers])
    return feeds


def unsure(doubts: Sequence[Doubt], margin: int) -> dict[str, float]:
    """How far float32 may be off in each tensor, over the largest number there, as `Precision.layer_tolerance` has it.

    `doubts` are of the places, `margin` that of a `Precision`. What float32 loses in a tensor shows best where it loses most: a place
    of a few tokens may be lucky.
    """
    found: dict[str, float] = {}
    for doubt in doubts:
        for other in doubt.others:
            for (name, right, scale), (_, actual, _) in zip(_tensors(doubt.right), _tensors(other), strict=True):
                error = float((np.abs(right - actual) - _carried(name, right)).max(initial=0))
                if scale and np.isfinite(error):
                    found[name] = max(found.get(name, 0.0), margin * error / scale)
    return found


def _tensors(answers: Answers) -> Iterator[tuple[str, Array, float]]:
    """What a place's layers give: name, numbers, and the largest that the layer itself made of them."""
    before: Array | None = None
    for layer in range(len(answers[0].hidden_states)):
        stream = np.stack([answer.hidden_states[layer] for answer in answers])  # [B, S, hidden]
        yield hidden_state(layer), stream, _largest(stream if before is None else stream - before)
        before = stream
        for part, name in enumerate(PARTS):
            stored = np.stack([answer.cache[layer][part] for answer in answers])  # [B, Hkv, S, D]
            yield cache_output(layer, name), stored, _largest(stored)
    logits = np.stack([answer.logits[-1] for answer in answers])  # [B, V]
    yield "logits", logits, _largest(logits)


def judge(
    place: Place, answers: Answers, outputs: Outputs, precision: Precision, doubt: Mapping[str, float] | None = None
) -> list[Finding]:
    """Compare what the cut graph gave with what the oracle says; `doubt` of `unsure` decides where it allows more than the limit."""
    found = []
    update, stored = precision.layer_tolerance
    for number, (name, right, scale) in enumerate(_tensors(answers)):
        layer = number // (1 + len(PARTS))  # that of the logits is the number of layers
        actual = outputs[name]
        if name == "logits":
            actual, limit = actual[:, -1], precision.tolerance.limit(name, right)
        elif is_cache_output(name):
            limit = stored if precision.cache is not None else stored * scale
        else:
            limit = update * scale
        allowed = max(limit, (doubt or {}).get(name, 0.0) * scale) + _carried(name, right)
        found.append(_finding(place.check, layer, name, right, actual, allowed))
    return found


def _carried(name: str, right: Array) -> Array:
    """What the residual stream loses when a small number is added to it: of its own size, whatever the layer does."""
    carried = not is_cache_output(name) and name != "logits"
    return 4 * np.finfo(np.float32).eps * np.abs(right) if carried else np.zeros(right.shape)


def _largest(numbers: Array) -> float:
    return float(np.abs(numbers).max(initial=0, where=np.isfinite(numbers)))


def _finding(place: str, layer: int, tensor: str, right: Array, actual: Array, allowed: Array) -> Finding:
    right, actual = agreed(right, actual)
    allowed = np.where(np.isfinite(allowed), allowed, 0)
    errors = np.abs(right.astype(np.float64) - actual)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(errors == 0, 0, errors / allowed)  # nothing may be allowed where all is zero
    worst = np.unravel_index(np.argmax(np.where(np.isnan(ratios), np.inf, ratios)), errors.shape)
    return Finding(place, layer, tensor, float(errors[worst]), float(allowed[worst]), float(errors.mean()))


def layer_checks(findings: Sequence[Finding]) -> list[CheckResult]:
    """One check for each kind of place."""
    checks = []
    for place in dict.fromkeys(finding.place for finding in findings):
        here = [finding for finding in findings if finding.place == place]
        worst = max(here, key=lambda finding: finding.badness)
        mean = float(np.mean([finding.mean for finding in here]))
        passed = all(finding.passed for finding in here)
        checks.append(CheckResult(f"each layer alone, {place}", worst.error, mean, worst.limit, worst.tensor, passed))
    return checks


def layer_results(findings: Sequence[Finding], num_layers: int) -> list[LayerResult]:
    """The worst of each layer."""
    results = []
    for layer in range(num_layers):
        here = [finding for finding in findings if finding.layer == layer]
        worst = max(here, key=lambda finding: finding.badness)
        results.append(LayerResult(layer, worst.error, worst.limit, all(finding.passed for finding in here)))
    return results
