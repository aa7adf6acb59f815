"""What a sweep over group counts found, and which count it picks; plain data, as in report.json.

Losses are validation cross-entropy in nats per token; sizes are in bytes, times in seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Curve = list[tuple[int, float]]  # tokens trained on, loss


@dataclass(frozen=True)
class Point:
    """One number of key/value heads."""

    kv_heads: int
    converted_loss: float  # before any training
    loss: float  # after uptraining
    curve: Curve
    layer_errors: list[float]  # relative squared error of each layer's attention output, right after conversion
    kv_bytes_per_token: int
    weight_bytes: int
    cache_tokens: int  # that fit beside the weights
    largest_batch: dict[int, int]  # by context
    seconds_per_token: dict[int, float]  # of decoding one sequence, by context
    baseline_curve: Curve = field(default_factory=list)  # mean pooling and cross-entropy, at the paper's alpha

    @property
    def baseline_loss(self) -> float | None:
        """What the paper's recipe reaches."""
        return self.baseline_curve[-1][1] if self.baseline_curve else None


@dataclass(frozen=True)
class Choice:
    """The group count that was picked, None if nothing qualifies or nothing was asked, and why."""

    kv_heads: int | None
    reason: str


@dataclass(frozen=True)
class SweepReport:
    """A whole sweep. `original` is the checkpoint as it came, one of the points."""

    source: str
    model: dict[str, Any]  # facts of the checkpoint, as `headfold inspect` gives them
    settings: dict[str, Any]
    machine: dict[str, Any]
    original: int  # its key/value heads
    control_curve: Curve  # the original trained on as long as the others, with cross-entropy
    points: list[Point]  # ascending
    choice: Choice

    def point(self, kv_heads: int) -> Point:
        """The point of a count."""
        return next(point for point in self.points if point.kv_heads == kv_heads)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in cache size and loss alike, smallest cache first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kv_bytes_per_token, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def choose(points: Sequence[Point], budget_kv_bytes: int | None, max_loss: float | None) -> Choice:
    """The lowest loss whose cache is within the budget; or the smallest cache whose loss is low enough. With both, the latter
    among those within the budget.
    """
    if budget_kv_bytes is None and max_loss is None:
        return Choice(None, "No choice was asked for: give --budget-kv-bytes or --max-loss.")
    within = [p for p in points if budget_kv_bytes is None or p.kv_bytes_per_token <= budget_kv_bytes]
    if not within:
        least = min(points, key=lambda p: p.kv_bytes_per_token)
        return Choice(
            None,
            f"No count is within {budget_kv_bytes:,} bytes per token: for {_heads(least)} it is {least.kv_bytes_per_token:,}.",
        )
    budget = f" within {budget_kv_bytes:,} bytes per token" if budget_kv_bytes is not None else ""
    if max_loss is None:
        best = min(within, key=lambda p: (p.loss, p.kv_bytes_per_token))
        return Choice(
            best.kv_heads,
            f"{_heads(best)} has the lowest loss after uptraining, {best.loss:.4f}, of the {len(within)} counts{budget} "
            f"({best.kv_bytes_per_token:,}).",
        )
    good = [p for p in within if p.loss <= max_loss]
    if not good:
        best = min(within, key=lambda p: p.loss)
        return Choice(
            None,
            f"No count{budget} has a loss of at most {max_loss:g}: the lowest, of {_heads(best)}, is {best.loss:.4f}.",
        )
    least = min(good, key=lambda p: p.kv_bytes_per_token)
    return Choice(
        least.kv_heads,
        f"{_heads(least)} has the smallest cache, {least.kv_bytes_per_token:,} bytes per token, of the {len(good)} counts{budget} "
        f"whose loss after uptraining is at most {max_loss:g} ({least.loss:.4f}).",
    )


def _heads(point: Point) -> str:
    return f"{point.kv_heads} key/value head{'s' if point.kv_heads > 1 else ''}"
