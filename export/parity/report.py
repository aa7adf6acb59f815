"""What parity found, as data: every check and layer, the verdict, and the first thing that is wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.export.parity.tolerances import Precision

Array = NDArray[Any]


@dataclass(frozen=True)
class CheckResult:
    """One comparison, of logits or of other tensors. NaN anywhere fails, but where the oracle has it too; see `agreed`."""

    name: str
    max_error: float
    mean_error: float
    limit: float  # of the tensor that came closest to its limit, or went furthest over
    worst: str  # that tensor's name
    passed: bool
    cosine: float | None = None  # of logits: the smallest over all rows
    kl: float | None = None  # of softmaxed logits, nats, PyTorch || the graph: the largest over all rows
    top1: float | None = None  # share of rows whose likeliest token agrees
    note: str = ""


def verdict(name: str, faults: Sequence[tuple[str, str]]) -> CheckResult:
    """A check that has no measure: everything is right, or the first thing that is not is named."""
    where, what = faults[0] if faults else ("", "")
    return CheckResult(name, float(len(faults)), float(len(faults)), 0.0, where, not faults, note=what)


@dataclass(frozen=True)
class LayerResult:
    """The residual stream after one layer."""

    layer: int
    max_error: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one bundle."""

    precision: Precision
    oracle: str  # who said what is right
    checks: Sequence[CheckResult]
    layers: Sequence[LayerResult]
    greedy_tokens: int
    first_divergent_token: int | None
    finite: bool  # whether the oracle's own logits are numbers, all of them

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance."""
        return all(check.passed for check in self.checks)

    @property
    def first_bad_layer(self) -> int | None:
        """The first layer after which the residual stream is out of tolerance."""
        return next((layer.layer for layer in self.layers if not layer.passed), None)

    def failure(self) -> str:
        """One line that names the first failing comparison and the first bad layer."""
        check = next(check for check in self.checks if not check.passed)
        layer = f", first bad layer {self.first_bad_layer}" if self.first_bad_layer is not None else ""
        what = check.note or f"is off by {check.max_error:.3g}, allowed {check.limit:.3g}"
        return f"differs from PyTorch in {check.name}: {check.worst} {what}{layer}"

    def summary(self) -> dict[str, Any]:
        """What goes into the manifest."""
        tops = [check.top1 for check in self.checks if check.top1 is not None]
        return {
            "passed": self.passed,
            "max_logit_error": max((c.max_error for c in self.checks if c.worst == "logits"), default=0.0),
            "top1_agreement": min(tops, default=1.0),
            "arithmetic": self.precision.arithmetic,
            "oracle": self.oracle,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        content = asdict(self)
        extra = {
            "passed": self.passed,
            "first_bad_layer": self.first_bad_layer,
            "arithmetic": self.precision.arithmetic,
            "oracle": self.oracle,
        }
        return extra | content


def agreed(expected: Array, actual: Array) -> tuple[Array, Array]:
    """Both with zeros where neither is a number, as weights make it that --allow-nan exports.

    Which of NaN and the two infinities a sum that overflows becomes depends on its order.
    """
    if np.isfinite(expected).all():
        return expected, actual
    same = ~np.isfinite(expected) & ~np.isfinite(actual)
    return np.where(same, 0, expected), np.where(same, 0, actual)


def compare_logits(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> tuple[float, float, float]:
    """Smallest cosine, largest KL divergence and top-1 agreement over the rows of logits [..., V]; rows of zeros do not count."""
    e, a = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (expected, actual))
    real = np.abs(e).max(axis=1) > 0
    if not real.any():
        return 1.0, 0.0, 1.0
    e, a = e[real], a[real]
    cosine = (e * a).sum(1) / (np.linalg.norm(e, axis=1) * np.linalg.norm(a, axis=1))
    log_e, log_a = (x - x.max(1, keepdims=True) for x in (e, a))
    log_e, log_a = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (log_e, log_a))
    kl = (np.exp(log_e) * (log_e - log_a)).sum(1)
    return float(cosine.min()), float(max(kl.max(), 0.0)), float((e.argmax(1) == a.argmax(1)).mean())
