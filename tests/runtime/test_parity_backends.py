"""The comparison of serving backends, on the one that runs everywhere: it passes what is right and fails what is not."""

import numpy as np
import pytest

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
    checks = verify_backends(lambda: DecoderOracle(toy.decoder), opened, PRECISION, PROMPTS, decode_steps=4)
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
