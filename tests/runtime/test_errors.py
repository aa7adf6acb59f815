"""An error is one line with place and remedy, and carries the exit code the command line uses."""

import subprocess
import sys

from headfold.runtime import BundleError, VerificationError


def test_one_line_with_place_and_remedy() -> None:
    error = BundleError("the file was\nchanged", where="b/model.onnx", fix="Export it again.")
    assert str(error) == "b/model.onnx: the file was changed. Export it again."


def test_exit_codes() -> None:
    assert (BundleError("x").exit_code, VerificationError("x").exit_code) == (2, 1)


def test_runtime_does_not_import_torch() -> None:
    code = "import headfold.runtime, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
