"""Whole commands, killed at any moment: the old or the new is there, whole; what is not theirs stays; the next run cleans up.

The next run starts from a sample of the moments; from all of them with HEADFOLD_KILLS=all.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from moments import moments

from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main
from headfold.export.training.state import checkpoints
from headfold.runtime.manifest import check_files, read_manifest

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("uptrain", "sweep")]
_RUNS = 3  # of each command, after its first
State = str | None  # of an output: none, or which one it is


@dataclass
class Case:
    """A command and its output: `before` it is there as it was, `after` it as it becomes, whole."""

    arguments: list[object]
    state: Callable[[Path], State]
    before: State
    after: State
    replaces: bool  # whether the next run replaces what a killed one finished


def bundle_state(path: Path) -> State:
    if not path.exists():
        return None
    manifest = read_manifest(path)
    check_files(path, manifest)
    return f"capacity {manifest.cache.capacity}, {len(manifest.engines)} engines"


def checkpoint_state(path: Path) -> State:
    if not path.exists():
        return None
    checkpoint = open_checkpoint(path)
    assert all(checkpoint.read(name).isfinite().all() for name in checkpoint)
    return f"{checkpoint.config.num_key_value_heads} heads"


def run_state(path: Path) -> State:
    """Of uptraining: its checkpoints are whole, too."""
    for step in checkpoints(path.with_name(f"{path.name}.training")):
        assert all(tensor.isfinite().all() for tensor in map(open_checkpoint(step).read, open_checkpoint(step)))
    return checkpoint_state(path)


def sweep_state(path: Path) -> State:
    for step in path.glob("runs/*/step-*"):
        open_checkpoint(step)
    for trained in path.glob("kv-*"):
        checkpoint_state(trained)
    return "report" if (path / "report.html").exists() else None


TRAIN = ["--holdout", "0.1", "--batch", 2, "--sequence", 16, "--cpu", "-q"]


@pytest.fixture
def cases(toys, tensorrt_toy, toy_checkpoint) -> dict[str, Callable[[Path], Case]]:
    """Each makes its output in a directory; what is there before is put there."""
    text, student = toys / "text.txt", toys / "student"

    def export(root: Path) -> Case:
        shutil.copytree(tensorrt_toy("float16").bundle, root / "out")
        arguments = ["export", toy_checkpoint, "-o", root / "out", "--no-verify", "--force", "-q", "--capacity", 24]
        return Case(arguments, bundle_state, "capacity 40, 0 engines", "capacity 24, 0 engines", True)

    def build(root: Path) -> Case:
        shutil.copytree(tensorrt_toy("float16").bundle, root / "out")
        small = ["--sm", "86", "--max-batch", 1, "--max-input", 8, "--capacity", 16, "--force", "-q"]
        return Case(
            ["build", root / "out", *small], bundle_state, "capacity 40, 0 engines", "capacity 40, 1 engines", True
        )

    def convert(root: Path) -> Case:
        small = ["--kv-heads", 1, "--data", text, "--calibration-tokens", 64, "--calibration-length", 16, "-q"]
        arguments = ["convert", toys / "mha", "-o", root / "out", *small, "--report", root / "report.json"]
        return Case(arguments, checkpoint_state, None, "1 heads", False)

    def uptrain(root: Path) -> Case:
        often = ["--tokens", 4 * 2 * 16, "--checkpoint-every", 1, "--keep", 1, "--resume"]
        arguments = ["uptrain", student, "-o", root / "out", "--teacher", toys / "mha", "--data", text]
        return Case([*arguments, *often, *TRAIN], run_state, None, "2 heads", False)

    def sweep(root: Path) -> Case:
        few = [
            "--tokens",
            2 * 16,
            "--evaluate-sequences",
            2,
            "--contexts",
            "8",
            "--rounds",
            1,
            "--threads",
            1,
            "--no-control",
            "--resume",
        ]
        arguments = ["sweep", student, "-o", root / "out", "--kv-heads", "1", "--data", text]
        return Case([*arguments, *few, *TRAIN], sweep_state, None, "report", True)

    return {f.__name__: f for f in (export, build, convert, uptrain, sweep)}


def runs(arguments: list[object]) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def sample(copies: list[Path]) -> list[Path]:
    """Some moments right before and behind one at which something came or went, other than in a stage."""
    if os.environ.get("HEADFOLD_KILLS") == "all":
        return copies
    seen = [{name for name in listing(copy) if ".headfold-stage-" not in name} for copy in copies]
    turns = [i + step for i in range(1, len(copies)) if seen[i] != seen[i - 1] for step in (-1, 0)]
    return [copies[turns[len(turns) * i // _RUNS]] for i in range(_RUNS)] + copies[-1:]


@pytest.mark.parametrize("name", ["export", "build", "convert", *SLOW])
def test_a_kill_leaves_the_old_or_the_new_and_the_next_run_succeeds(name, cases, tmp_path, monkeypatch) -> None:
    if name == "build" and find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install tensorrt-rtx")
    root, kept = tmp_path / "root", tmp_path / "kept"
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))  # matplotlib's own leftovers are not ours to remove
    root.mkdir()
    case = cases[name](root)
    (root / "theirs.txt").write_text("theirs")
    (root / "theirs").mkdir()
    assert case.state(root / "out") == case.before
    with moments(root, kept, monkeypatch) as copies:
        code, said = runs(case.arguments)
    assert code == 0, said
    assert case.state(root / "out") == case.after
    expected = listing(root)
    for copy in copies:
        assert case.state(copy / "out") in (case.before, case.after), copy
    for copy in sample(copies):
        shutil.rmtree(root)
        shutil.copytree(copy, root, symlinks=True)
        finished = case.state(root / "out") == case.after
        code, said = runs(case.arguments)
        if finished and not case.replaces:
            assert (code, "already exists" in said) == (2, True), copy
        else:
            assert code == 0, (copy, said)
        assert case.state(root / "out") == case.after, copy
        assert listing(root) <= expected, copy
        assert (root / "theirs.txt").read_text() == "theirs"


def listing(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_sigkill_itself(toy_checkpoint, tmp_path) -> None:
    command = [Path(sys.executable).parent / "headfold", "export", toy_checkpoint, "-o", tmp_path / "out", "-q"]
    process = subprocess.Popen(command)
    while not list(tmp_path.glob(".headfold-stage-*/new/*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    assert bundle_state(tmp_path / "out") is None
    assert runs([*command[1:], "--no-verify"])[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
