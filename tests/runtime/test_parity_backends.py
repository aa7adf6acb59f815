"""The comparison of serving backends, on the one that runs everywhere: it passes what is right and fails what is not."""

import numpy as np
import pytest
import torch

from headfold.export.exportables.oracle import Answer
from headfold.export.exportables.own import DecoderOracle
from headfold.export.parity.backends import verify_backends
from headfold.export.parity.tolerances import Precision
from headfold.runtime.manifest import read_manifest
from headfold.runtime.session import OrtSession

PROMPTS = [np.arange(1, 13), np.arange(20, 25), np.arange(30, 39)]
PRECISION = Precision("onnxruntime", "float32")
RAGGED = ("ragged batch, right padding", "ragged batch, left padding")


class Shifted(OrtSession):
    """Believes each row one token shorter than it is when it decodes."""

    def decode(self, cache, tokens, active):
        cache.lengths -= 1
        logits = super().decode(cache, tokens, active)
        cache.lengths += 1
        return logits


class Swapped(OrtSession):
    """Gives the rows' logits in another order."""

    def decode(self, cache, tokens, active):
        return super().decode(cache, tokens, active)[::-1]


def verify(toy, **backends):
    manifest = read_manifest(toy.path)
    opened = {name: lambda kind=kind: kind(toy.path, manifest, threads=1) for name, kind in backends.items()}
    checks = verify_backends(lambda _: DecoderOracle(toy.decoder), opened, PRECISION, PROMPTS, decode_steps=4)
    return {(check.backend, check.name): check for check in checks}


def test_each_backend_has_every_check_and_passes(toy) -> None:
    checks = verify(toy, first=OrtSession, second=OrtSession)
    names = ["prefill", "decode", "chunked prefill", *RAGGED]
    assert list(checks) == [(backend, name) for backend in ("first", "second") for name in names]
    for check in checks.values():
        assert check.passed
        assert check.max_error < check.limit
        assert check.cosine > 0.999999
        assert check.top1 == 1


@pytest.mark.parametrize(
    ("kind", "failing"),
    [(Shifted, {"decode", "chunked prefill", *RAGGED}), (Swapped, set(RAGGED))],  # one of the chunks is a single token
    ids=["shifted", "swapped"],
)
def test_what_is_wrong_fails_and_only_that(kind, failing, toy) -> None:
    checks = verify(toy, right=OrtSession, wrong=kind)
    assert {name for (backend, name), check in checks.items() if backend == "wrong" and not check.passed} == failing
    assert all(check.passed for (backend, _), check in checks.items() if backend == "right")


class Router:
    """An oracle whose experts nearly tie in its last row: the logits are other ones once its weights are nudged."""

    name = "router"

    def __init__(self, dtype: torch.dtype) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False).to(dtype)
        self.weight = self.module.weight.item()

    def answer(self, tokens, past=None, given=None, cache=None) -> Answer:
        logits = np.outer(tokens % 3, np.arange(7.0))
        if self.module.weight.item() < self.weight and tokens[0] == PROMPTS[2][0]:
            logits += 1
        return Answer(logits.astype(np.float32), [], [])


class Tied:
    """Its backend: `off` away from the oracle, in the rows that start with `first`."""

    def __init__(self, first: int, off: float) -> None:
        self.first, self.off = first, off

    def new_cache(self, batch, capacity):
        return [None] * batch

    def prefill(self, cache, row, tokens):
        cache[row] = cache[row] or tokens[0]
        return tokens[-1] % 3 * np.arange(7.0) + self.off * (cache[row] == self.first)

    def decode(self, cache, tokens, active):
        return np.stack([self.prefill(cache, row, tokens[row : row + 1]) for row in range(len(tokens))])


@pytest.mark.parametrize(
    ("first", "off", "passed"), [(30, 1.0, True), (30, 0.5, False), (1, 1.0, False), (30, np.nan, False)]
)
def test_a_near_tie_may_fall_the_other_way_and_nothing_else(first, off, passed) -> None:
    """30 is the first token of the row that nearly ties, 1 of another."""
    tied = {"tied": lambda: Tied(first, off)}
    checks = verify_backends(Router, tied, Precision("onnxruntime", "float16"), PROMPTS, decode_steps=4, nudges=8)
    ragged = [check for check in checks if check.name in RAGGED]
    assert [check.passed for check in ragged] == [passed, passed]
    assert [check.near_ties for check in ragged] == [3 * passed] * 2  # its prompt, and two tokens after it
    unasked = verify_backends(Router, tied, Precision("onnxruntime", "float16"), PROMPTS, decode_steps=4)
    assert not all(check.passed for check in unasked)
