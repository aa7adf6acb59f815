"""Proof that a serving backend is PyTorch's: the same feeds as for the exported graph, through the interface that `generate` uses.

Polygraphy runs the oracle and the backends one after the other. This is what `scripts/gpu_check` compares on a GPU: ONNX Runtime's CUDA
provider and TensorRT's engines; one on the CPU goes the same way. Where a router's scores nearly tie, 16 bits choose other experts:
if asked to, such a row passes that weights give which the backend's dtype can hardly tell from the model's.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator

from headfold.export.exportables.oracle import Oracle, Tokens, nudge
from headfold.export.parity.compare import expected_outputs
from headfold.export.parity.probes import Step, make_rows, make_steps
from headfold.export.parity.report import compare_logits
from headfold.export.parity.runners import Outputs, feed_metadata
from headfold.export.parity.tolerances import Precision
from headfold.export.progress import quiet_polygraphy
from headfold.runtime.backend import Backend

Logits = Sequence[NDArray[np.float32]]  # of each step, [B, 1, V]


@dataclass(frozen=True)
class BackendCheck:
    """One check of one backend: logits of each row's last token, over all steps that belong to it.

    `near_ties` are rows that only weights hardly different from the model's give so; cosine and top1 are to the model's.
    """

    backend: str
    name: str
    max_error: float
    limit: float
    cosine: float
    top1: float
    near_ties: int
    passed: bool


class BackendRunner(BaseRunner):  # type: ignore[misc]
    """A backend behind polygraphy's interface. A feed whose mask is as wide as its ids starts new sequences; padding is left out."""

    def __init__(self, name: str, load: Callable[[], Backend[Any]], capacity: int) -> None:
        super().__init__(name=name, prefix=name)
        self._load, self._capacity = load, capacity

    def activate_impl(self) -> None:
        """Open the backend."""
        self._backend: Backend[Any] | None = self._load()
        self._cache: Any = None

    def deactivate_impl(self) -> None:
        """Let the backend go, and its memory with it."""
        self._backend = self._cache = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See there."""
        return feed_metadata()

    def infer_impl(self, feed_dict: Any) -> Outputs:
        """Logits [B, 1, V] of each row's last real token."""
        backend = self._backend
        assert backend is not None
        ids, mask = feed_dict["input_ids"], feed_dict["attention_mask"]
        batch, length = ids.shape
        fresh = mask.shape[1] == length
        if fresh:
            self._cache = backend.new_cache(batch, self._capacity)
        if length == 1 and not fresh:
            logits = backend.decode(self._cache, ids[:, 0], np.ones(batch, np.bool_)).copy()
        else:
            new = mask[:, -length:] == 1
            logits = np.stack([backend.prefill(self._cache, row, ids[row][new[row]]) for row in range(batch)])
        self.inference_time = 0.0
        return OrderedDict(logits=logits[:, None].astype(np.float32))


def verify_backends(
    load: Callable[[torch.dtype], Oracle],
    backends: Mapping[str, Callable[[], Backend[Any]]],
    precision: Precision,
    prompts: Sequence[NDArray[np.int64]],
    decode_steps: int,
    nudges: int = 0,
) -> list[BackendCheck]:
    """Compare backends with an oracle.

    Args:
        load: makes the oracle, in that arithmetic; it is freed before the first backend is opened.
        backends: what opens each backend, by name; one is open at a time.
        precision: how the backends compute: picks the tolerance.
        prompts: token ids; the first is also decoded and chunked, all of them make the ragged batch.
        decode_steps: tokens decoded, at least 1.
        nudges: how many sets of such weights to try where a backend is out of tolerance; of a near-tie a part of them falls each way.
    """
    rows = make_rows(prompts, decode_steps, max(int(prompt.max()) for prompt in prompts) + 1)
    steps = list(make_steps(rows, prompts))
    feeds = [step.feed for step in steps]
    capacity = max(step.feed["attention_mask"].shape[1] for step in steps) + 1
    tellings = _tellings(load, rows, steps, getattr(torch, precision.dtype), nudges)
    told = [next(tellings)]
    with quiet_polygraphy():
        runners = [BackendRunner(name, open_, capacity) for name, open_ in backends.items()]
        results = Comparator.run(runners, data_loader=feeds, use_subprocess=False)
    checks = []
    for name, actual in results:
        logits = [outputs["logits"] for outputs in actual]
        found = _checks(name, steps, logits, told, precision)
        while not all(check.passed for check in found) and (another := next(tellings, None)) is not None:
            told.append(another)
            found = _checks(name, steps, logits, told, precision)
        checks += found
    return checks


def _tellings(
    load: Callable[[torch.dtype], Oracle],
    rows: Sequence[Tokens],
    steps: Sequence[Step],
    dtype: torch.dtype,
    nudges: int,
) -> Iterator[Logits]:
    """The oracle's logits of all steps; then, should anybody ask, those of weights that `dtype` can hardly tell from its own."""

    def tell(oracle: Oracle) -> Logits:
        answers = [oracle.answer(row) for row in rows]
        return [expected_outputs(step, answers, all_logits=False)["logits"].astype(np.float32) for step in steps]

    yield tell(load(torch.float32))
    for seed in range(nudges):
        oracle = load(torch.float64)
        nudge(oracle.module, seed, dtype)
        yield tell(oracle)


def _checks(
    backend: str, steps: Sequence[Step], actual: Logits, told: Sequence[Logits], precision: Precision
) -> list[BackendCheck]:
    """Each row of each step against the first telling, or where that is out of tolerance the one it is nearest to."""
    checks = []
    for check in dict.fromkeys(step.check for step in steps):
        errors, ties, agreements = [], 0, []
        for number in (number for number, step in enumerate(steps) if step.check == check):
            expected = np.stack([logits[number] for logits in told])  # [tellings, B, 1, V]
            limit = precision.tolerance.limit("logits", expected[0])
            distances = np.abs(expected - actual[number]).max(axis=(2, 3))  # NaN where a logit is
            strays = ~(distances[0] <= limit)
            nearest = np.where(strays, distances.min(axis=0), distances[0])
            ties += int((strays & (nearest <= limit)).sum())
            errors.append((float(nearest.max()), limit))
            agreements.append(compare_logits(expected[0], actual[number]))
        error, limit = max(errors, key=lambda pair: np.inf if np.isnan(pair[0]) else pair[0] / pair[1])
        cosine, _, top1 = zip(*agreements, strict=True)
        passed = all(bool(found <= most) for found, most in errors)  # NaN is not
        checks.append(BackendCheck(backend, check, error, limit, min(cosine), float(np.mean(top1)), ties, passed))
    return checks
