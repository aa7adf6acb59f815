"""A tiny random model of every type that headfold tries, in float16, in ONNX Runtime with CUDA against PyTorch.

Part of `scripts/gpu_check`. What a type's graph has beside others' (a window, a Range, a router) has gone wrong on GPUs alone.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fakes"))

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.tried import TRIED
from headfold.export.parity.backends import BackendCheck, verify_backends
from headfold.export.parity.probes import make_prompts
from headfold.export.parity.verify import precision_of, reference_of
from headfold.export.progress import Reporter
from headfold.runtime.manifest import read_manifest
from headfold.runtime.session import OrtSession

PROMPT, NEW = 21, 12  # tokens; the windows that are tried are of 9
NUDGES = 32  # of a type with experts


@dataclass(frozen=True)
class TypeCheck:
    """What came of a type: its checks, or why there are none."""

    model_type: str
    checks: tuple[BackendCheck, ...] = ()
    missing: str = ""

    @property
    def passed(self) -> bool:
        """Whether it was exported and agrees."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def check_types(provider: str = "cuda") -> Iterator[TypeCheck]:
    """Every type that is not refused, as soon as it is exported: that takes the time, and all cores."""
    with tempfile.TemporaryDirectory() as directory:
        names = [row.model_type for row in TRIED if not row.refused]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=_alone) as pool:
            made = {name: pool.submit(_export, name, Path(directory) / name) for name in names}
            for name, export in made.items():
                yield _check(name, Path(directory) / name, export, provider)


def _alone() -> None:
    torch.set_num_threads(1)


def _export(model_type: str, directory: Path) -> None:
    from random_transformers import save_random  # imports transformers

    save_random(model_type, directory / "model")
    options = ExportOptions(dtype="float16", verify=False)
    export_bundle(open_exportable(directory / "model"), directory / "bundle", options, Reporter(quiet=True))


def _check(name: str, directory: Path, export: "Future[None]", provider: str) -> TypeCheck:
    try:
        export.result()
        bundle = directory / "bundle"
        source, manifest = open_exportable(directory / "model"), read_manifest(bundle)
        prompts = make_prompts(source.facts.vocab_size, PROMPT, None)
        oracle = partial(reference_of, bundle, source, manifest)
        backends = {provider: partial(OrtSession, bundle, manifest, provider)}
        return TypeCheck(name, tuple(verify_backends(oracle, backends, precision_of(manifest), prompts, NEW, NUDGES)))
    except Exception as error:  # one that another transformers lacks, or that a GPU cannot run, does not end the others
        return TypeCheck(name, missing=" ".join(f"{type(error).__name__}: {error}".split())[:300])
