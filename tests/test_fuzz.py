"""A sample of `scripts/fuzz`, and that it would see what it looks for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from headfold.runtime import BundleError

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_damaged_and_hostile_files_are_understood_or_refused_in_one_line() -> None:
    command = [sys.executable, SCRIPTS / "fuzz.py", "--inputs", "60", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "60 inputs, 0 failed, 0 causes\n"


class Panic(BaseException):
    """As pyo3 raises it: no Exception."""


def refused() -> None:
    try:
        bytearray(1 << 62)
    except MemoryError as error:
        raise BundleError("is too large") from error


def endless_line() -> None:
    error = BundleError("x")
    error.args = ("two\nlines",)
    raise error


@pytest.mark.parametrize(
    ("bug", "cause"),
    [
        (lambda: {}["x"], "KeyError in "),
        (lambda: (_ for _ in ()).throw(Panic("at the disco")), "Panic in "),
        (refused, "over 2 GiB, and said so"),
        (endless_line, "an error of more than one line"),
    ],
)
def test_what_is_judged_a_failure(bug, cause, judged, tmp_path) -> None:
    assert judged(lambda _: bug(), tmp_path).cause.startswith(cause)


def test_what_is_none(judged, tmp_path) -> None:
    def refusing(path: Path) -> None:
        raise BundleError("is damaged", where=path)

    assert judged(refusing, tmp_path) is None
    assert judged(lambda path: None, tmp_path) is None


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(SCRIPTS)
    from fuzzing.attempt import judged

    return judged


def test_a_seed_is_the_same_input_again(monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from fuzzing.gguf_files import gguf_file
    from fuzzing.mutations import damaged_json
    from fuzzing.templates import template

    content = {"a": [1, 2.5, "x", {"b": None}], "c": True}
    for make in (lambda rng: damaged_json(rng, content), template, lambda rng: gguf_file(rng, content, {})):
        made = [make(Random("kind 7")) for _ in range(2)]
        assert made[0] == made[1]
        assert len({make(Random(f"kind {seed}")) for seed in range(50)}) > 30
