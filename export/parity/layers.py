"""Each layer alone: fed with what the oracle's layer before hands on, at every kind of position.

So no error is amplified by what comes behind it, and the first wrong layer is named rightly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headfold.export.exportables.oracle import Answer, Array, Oracle, QuantizedCache
from headfold.export.parity.probes import Feed, Pasts, Place, feed
from headfold.export.parity.report import CheckResult, LayerResult, agreed
from headfold.export.parity.runners import Outputs
from headfold.export.parity.tolerances import MARGIN, Precision
from headfold.plugins.names import PARTS, cache_input, cache_output, hidden_state, layer_input

Answers = Sequence[Answer]  # of a place's rows


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
    """Inputs of the graph whose layers are cut apart (`cut_layers`, `keep_new_rows`)."""
    batch, length = place.tokens.shape
    total = max(place.pasts) + length
    mask = np.zeros((batch, total), np.int64)
    for row, past in enumerate(place.pasts):
        mask[row, :past] = mask[row, total - length :] = 1
    feeds = feed(place.tokens, mask)
    feeds |= {"new_rows.start": np.array([min(place.pasts)]), "new_rows.end": np.array([total])}
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


def judge(
    place: Place, answers: Answers, outputs: Outputs, precision: Precision, doubt: tuple[Answers, Answers] | None = None
) -> list[Finding]:
    """Compare what the cut graph gave with what the oracle says.

    `doubt` are the same answers computed in float32 and in float64: where float32 itself is unsure by more than the limit, that
    decides.
    """
    found = []
    layers = len(answers[0].hidden_states)
    start, length = min(place.pasts), place.tokens.shape[1]
    update, stored = precision.layer_tolerance
    for layer in range(layers):
        right = np.stack([answer.hidden_states[layer] for answer in answers])  # [B, S, hidden]
        before = np.stack([answer.hidden_states[layer - 1] for answer in answers]) if layer else np.zeros_like(right)
        spread = update * _largest(right - before) + 4 * np.finfo(np.float32).eps * np.abs(right)
        unsure = _unsure([[a.hidden_states[layer] for a in side] for side in doubt or ()])
        found.append(
            _finding(
                place.check, layer, hidden_state(layer), right, outputs[hidden_state(layer)], np.maximum(spread, unsure)
            )
        )
        for part, name in enumerate(PARTS):
            right = np.stack([answer.cache[layer][part] for answer in answers])  # [B, Hkv, S, D]
            whole = outputs[cache_output(layer, name)]  # [B, Hkv, from the shortest past on, D]
            begins = [past - start for past in place.pasts]
            actual = np.stack([whole[row, :, begin : begin + length] for row, begin in enumerate(begins)])
            spread = np.full(right.shape, stored if precision.cache is not None else stored * _largest(right))
            unsure = _unsure([[a.cache[layer][part] for a in side] for side in doubt or ()])
            found.append(
                _finding(place.check, layer, cache_output(layer, name), right, actual, np.maximum(spread, unsure))
            )
    right = np.stack([answer.logits[-1] for answer in answers])  # [B, V]
    spread = np.full(right.shape, precision.tolerance.limit("logits", right))
    unsure = _unsure([[a.logits[-1] for a in side] for side in doubt or ()])
    found.append(_finding(place.check, layers, "logits", right, outputs["logits"][:, -1], np.maximum(spread, unsure)))
    return found


def _unsure(sides: Sequence[Sequence[Array]]) -> float:
    """How far float32 may be off, from the same tensors of every row in float32 and in float64."""
    if not sides:
        return 0.0
    return MARGIN * max(float(np.abs(a - b).max(initial=0)) for a, b in zip(*sides, strict=True))


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
