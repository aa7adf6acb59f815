"""What parity measures, what it tolerates and why, and how it is shown: a table for people, JSON for scripts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from headfold.plugins.names import is_cache_output


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute error allowed: `absolute`, or `relative` times the oracle's largest magnitude in the tensor if more.

    Logits and everything else differ: logits are what users see; residual streams have a few elements in the thousands (Sun et al.
    2024, Massive Activations, section 2), and an error is small or large in relation to those.
    """

    logits: tuple[float, float]
    other: tuple[float, float]  # caches and residual stream
    cache: tuple[float, float] | None = None  # of a quantized cache, in what it stores

    def limit(self, name: str, expected: NDArray[np.float32]) -> float:
        """The largest error allowed in this output."""
        absolute, relative = self.logits if name == "logits" else self.other
        if self.cache is not None and is_cache_output(name):
            absolute, relative = self.cache
        return max(absolute, relative * float(np.abs(expected).max(initial=0)))


TOLERANCES = {
    # float32: eps is 1.2e-7; sums of about a thousand products in another order, through some tens of layers, lose about two digits.
    # SmolLM2's logits reach 29, and are off by up to 7e-5 from float64 in ONNX Runtime as in PyTorch.
    "float32": Tolerance(logits=(1e-4, 5e-6), other=(1e-4, 1e-5)),
    # float16: eps is 9.8e-4; every intermediate result is rounded in the graph, but not in the float32 oracle that has the same
    # weights; roundings add up like a random walk, about 8 eps after 30 layers.
    "float16": Tolerance(logits=(1e-2, 2e-2), other=(1e-2, 2e-2)),
    # bfloat16: the graph is compared in float32 arithmetic, with its bfloat16 weights and rotary tables on both sides.
    "bfloat16": Tolerance(logits=(1e-4, 5e-6), other=(1e-4, 1e-5)),
    # The TensorRT network as parsed rounds every intermediate result to its own dtype. float16 as above; bfloat16 has three bits
    # less, so eight times as much.
    "tensorrt float32": Tolerance(logits=(1e-4, 5e-6), other=(1e-4, 1e-5)),
    "tensorrt float16": Tolerance(logits=(1e-2, 2e-2), other=(1e-2, 2e-2)),
    "tensorrt bfloat16": Tolerance(logits=(8e-2, 1.6e-1), other=(8e-2, 1.6e-1)),
}
_ROUNDED = (5e-2, 5e-2)
_NARROW = {"float16", "tensorrt float16", "tensorrt bfloat16"}
_CACHES = {"int8": 8.0, "float8_e4m3fn": 96.0}  # in what a quantized cache stores: 8 steps, or 3 of the largest


def precision(dtype: str, cache: str) -> str:
    """How a graph of `dtype` with a cache of `cache` computes, for the functions below: "float16", or "float16 int8"."""
    return dtype if cache == dtype else f"{dtype} {cache}"


def tolerance(precision: str) -> Tolerance:
    """What is tolerated.

    Where arithmetic differs a little, a value halfway between two numbers of a quantized cache is rounded to either; by it the next
    layers get other inputs and round more values differently, so that the logits end up as far apart as quantization itself moves
    them: by a few percent of the largest. What is exact about a quantized cache is tested where it can be, on the op alone.
    """
    dtype, cache = _split(precision)
    return TOLERANCES[dtype] if cache is None else Tolerance(_ROUNDED, _ROUNDED, (_CACHES[cache], 0.0))


def narrow(precision: str) -> bool:
    """Whether a near-tie of two tokens may fall the other way."""
    dtype, cache = _split(precision)
    return cache is not None or dtype in _NARROW


def in_float32(precision: str) -> bool:
    """Whether both sides compute in float32 throughout, so that float64 tells how exact they can be."""
    return precision in {"float32", "bfloat16", "tensorrt float32"}


def arithmetic(precision: str) -> str:
    """How both sides compute, in words."""
    dtype, cache = _split(precision)
    return ARITHMETIC[dtype] + (f", {cache} cache on both sides" if cache is not None else "")


def _split(precision: str) -> tuple[str, str | None]:
    dtype, _, last = precision.rpartition(" ")
    return (dtype, last) if last in _CACHES else (precision, None)


ARITHMETIC = {
    "float32": "float32 on both sides",
    "float16": "float16 graph against float32 PyTorch with the same float16 weights",
    "bfloat16": "float32 on both sides, with the bundle's bfloat16 weights: ONNX Runtime has no bfloat16 on CPUs",
    **{
        f"tensorrt {dtype}": f"TensorRT network in {dtype}, on the CPU, against float32 PyTorch with the same {dtype} weights"
        for dtype in ("float32", "float16", "bfloat16")
    },
}


@dataclass(frozen=True)
class CheckResult:
    """One comparison, of logits or of other tensors. NaN anywhere fails."""

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

    dtype: str
    checks: Sequence[CheckResult]
    layers: Sequence[LayerResult]
    greedy_tokens: int
    first_divergent_token: int | None

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
        return f"differs from PyTorch in {check.name}: {check.worst} is off by {check.max_error:.3g}, allowed {check.limit:.3g}{layer}"

    def summary(self) -> dict[str, Any]:
        """What goes into the manifest."""
        tops = [check.top1 for check in self.checks if check.top1 is not None]
        return {
            "passed": self.passed,
            "max_logit_error": max((c.max_error for c in self.checks if c.worst == "logits"), default=0.0),
            "top1_agreement": min(tops, default=1.0),
            "arithmetic": arithmetic(self.dtype),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        content = asdict(self)
        extra = {"passed": self.passed, "first_bad_layer": self.first_bad_layer, "arithmetic": arithmetic(self.dtype)}
        return extra | content


def compare_logits(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> tuple[float, float, float]:
    """Smallest cosine, largest KL divergence and top-1 agreement over the rows of logits [..., V]; rows of zeros are padding."""
    e, a = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (expected, actual))
    real = np.abs(e).max(axis=1) > 0
    e, a = e[real], a[real]
    cosine = (e * a).sum(1) / (np.linalg.norm(e, axis=1) * np.linalg.norm(a, axis=1))
    log_e, log_a = (x - x.max(1, keepdims=True) for x in (e, a))
    log_e, log_a = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (log_e, log_a))
    kl = (np.exp(log_e) * (log_e - log_a)).sum(1)
    return float(cosine.min()), float(max(kl.max(), 0.0)), float((e.argmax(1) == a.argmax(1)).mean())


def render(report: ParityReport, console: Console) -> None:
    """Print the report as a table, and the verdict under it."""
    table = Table(title=f"Parity with PyTorch ({arithmetic(report.dtype)})", title_justify="left")
    for column in ("check", "max error", "allowed", "mean error", "cosine", "KL", "top-1", ""):
        table.add_column(column, justify="left" if column in {"check", ""} else "right")
    for c in report.checks:
        verdict = "[green]ok[/green]" if c.passed else "[red]FAILED[/red]"
        name = f"{c.name} ({c.note})" if c.note else c.name
        cosine = "" if c.cosine is None else f"{c.cosine:.7f}"
        kl = "" if c.kl is None else f"{c.kl:.1e}"
        top1 = "" if c.top1 is None else f"{c.top1:.0%}"
        table.add_row(name, f"{c.max_error:.1e}", f"{c.limit:.1e}", f"{c.mean_error:.1e}", cosine, kl, top1, verdict)
    console.print(table)
    if report.first_bad_layer is not None:
        console.print(f"first bad layer: {report.first_bad_layer}")
    console.print("all within tolerance" if report.passed else "out of tolerance")
