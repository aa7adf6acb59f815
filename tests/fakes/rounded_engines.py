"""What tests of engines with rounded weights share: who has TensorRT, the proof of a parsed network, and which GPUs are refused."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from block_models import run

from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.engine.network_runner import network_candidate
from headfold.export.engine.options import BuildOptions
from headfold.export.exportables.own import OwnModel
from headfold.export.parity.report import ParityReport
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.plugins.attention.schema import Attention
from headfold.runtime.manifest import read_manifest

installed = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")


def network_report(bundle: Path, source: Path, attention: Attention) -> ParityReport:
    """The network that an engine of it would be built from, against PyTorch."""
    manifest, exportable = read_manifest(bundle), OwnModel(open_checkpoint(source))
    candidate = network_candidate(bundle, manifest, BuildOptions(attention=attention))
    return verify_bundle(bundle, exportable, manifest, 4, Reporter(quiet=True), candidate)


def check_gpus(numbers: str, older: int, newer: int, instead: str, bundle: Path, source: Path, path: Path) -> None:
    """Engines of a bundle are built for GPUs that have its numbers; of others, older ones, the command and an export say what to do."""
    spec = read_manifest(bundle).weights
    assert spec is not None
    built = path / "built"
    shutil.copytree(bundle, built)
    code, output = run("build", built, "--sm", f"{older},{newer}", "-q")
    assert code == 2
    said = f"--sm: SM {older} has no {numbers}. Export the bundle with --weights {instead}."
    assert said in output.replace("\n", " ")
    options = ("--weights", spec.scheme, "--target", "tensorrt-rtx", "--sm", "86")
    code, output = run("export", source, "-o", path / "no", *options)  # before a long export
    assert (code, f"SM 86 has no {numbers}" in output) == (2, True)
    code, output = run("build", built, "--sm", newer, "-q")
    assert code == 0, output
