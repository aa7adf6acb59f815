"""What Prometheus is told: queue, slots, tokens, how long they take, and what the cache spares."""

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headfold.runtime.generate import Delta, Model

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_GAUGES = {
    "waiting": "Prompts that no slot has taken yet.",
    "live": "Prompts that are computed or answered.",
    "slots": "Prompts that can be at the same time.",
}
_COUNTS = {
    "prompt_tokens": "Tokens of prompts that were computed.",
    "cached_tokens": "Tokens of prompts that the cache had.",
    "new_tokens": "Tokens of answers; their rate is tokens per second.",
    "steps": "Steps of decoding, each of a token for every answer, or of several for one.",
    "guessed_tokens": "Tokens that a draft or the text so far guessed, and a step checked.",
    "accepted_tokens": "Guessed tokens that came.",
}


class Meters:
    """Of one server."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Statuses(models))
        self.requests = Counter("headfold_http_requests", "By route.", ["route", "status"], registry=registry)
        self._answers = Counter("headfold_answers", "Or what became of them.", ["model", "end"], registry=registry)
        what = "From when a prompt is tokens to its answer's first, the queue included."
        self._first = Histogram(
            "headfold_time_to_first_token_seconds", what, ["model"], registry=registry, buckets=_FIRST
        )
        what = "From one token of an answer to its next."
        self._next = Histogram("headfold_token_seconds", what, ["model"], registry=registry, buckets=_NEXT)
        for name in models:  # a series that is there from the beginning has a rate from the first answer on
            self._first.labels(name)
            self._next.labels(name)
            for end in ("stop", "length", "cancelled", "error"):
                self._answers.labels(name, end)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def call(self, model: str, answers: int) -> "CallMeter":
        """A call of so many answers begins."""
        return CallMeter(self._first.labels(model), self._next.labels(model), self._answers, model, answers)


class CallMeter:
    """Of one call; `first` and `following` are where times go."""

    def __init__(self, first: Histogram, following: Histogram, ends: Counter, model: str, answers: int) -> None:
        self._first, self._following, self._ends, self._model = first, following, ends, model
        self._unfinished = answers
        self._last: list[float | None] = [None] * answers
        self._begun = time.perf_counter()

    def see(self, delta: Delta) -> None:
        """A token came."""
        now, last = time.perf_counter(), self._last[delta.index]
        if last is None:
            self._first.observe(now - self._begun)
        else:
            self._following.observe(now - last)
        self._last[delta.index] = now
        if delta.finish_reason is not None:
            self._unfinished -= 1
            self._ends.labels(self._model, delta.finish_reason).inc()

    def over(self, end: str) -> None:
        """No more comes: what is unfinished ended like that."""
        self._ends.labels(self._model, end).inc(self._unfinished)
        self._unfinished = 0


class _Statuses(Collector):
    """What the schedulers count themselves, when Prometheus asks."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        statuses = {name: model.status() for name, model in self._models.items()}
        for field, what in (_GAUGES | _COUNTS).items():
            family = GaugeMetricFamily if field in _GAUGES else CounterMetricFamily
            metric = family(f"headfold_{field}", what, labels=["model"])
            for name, status in statuses.items():
                metric.add_metric([name], getattr(status, field))
            yield metric
