"""An error is one line with place and remedy, and carries the exit code the command line uses."""

import subprocess
import sys

import pytest

from headfold.runtime import BundleError, VerificationError
from headfold.runtime.errors import printable


def test_one_line_with_place_and_remedy() -> None:
    error = BundleError("the file was\nchanged", where="b/model.onnx", fix="Export it again.")
    assert str(error) == "b/model.onnx: the file was changed. Export it again."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a \x1b[31mred\x1b[0m word", "a \ufffd[31mred\ufffd[0m word"),
        (
            "bell\a, C1 \x9b, right to left \u202e, half \ud800",
            "bell\ufffd, C1 \ufffd, right to left \ufffd, half \ufffd",
        ),
        ("two\nlines\tand\u2028more", "two lines and more"),
        ("Grüße, 世界 [bold]", "Grüße, 世界 [bold]"),
    ],
)
def test_what_a_terminal_would_obey_is_replaced(text, shown) -> None:
    assert printable(text) == shown
    assert str(BundleError(text, where=text, fix=text)) == f"{shown}: {shown}. {shown}"


def test_a_line_has_a_bounded_length_and_keeps_both_ends() -> None:
    line = str(BundleError("b" + "x" * 10**7 + "e", where="/" + "d" * 9999 + "/model.onnx", fix="Export it again."))
    assert len(line) < 1300
    assert line.startswith("/ddd")
    assert "/model.onnx: bxx" in line
    assert line.endswith("xxe. Export it again.")


def test_exit_codes() -> None:
    assert (BundleError("x").exit_code, VerificationError("x").exit_code) == (2, 1)


def test_runtime_does_not_import_torch() -> None:
    code = "import headfold.runtime, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
