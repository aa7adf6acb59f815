"""What serving must not drag in: a TensorRT machine has no onnxruntime, and nobody who serves has torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("headfold.runtime", {"onnxruntime", "torch", "tokenizers"}),
        ("headfold.runtime.tensorrt_session", {"onnxruntime", "torch", "headfold.export"}),
        ("headfold.runtime.generate", {"onnxruntime", "torch", "headfold.export"}),
        ("headfold.runtime.session", {"torch", "tensorrt_rtx", "headfold.export"}),
        ("headfold.runtime.server.app", {"onnxruntime", "torch", "headfold.export"}),
        ("headfold.export.cli", {"fastapi", "onnxruntime", "torch", "onnx"}),
    ],
)
def test_importing_it_imports_none_of(module: str, absent: set[str]) -> None:
    command = [sys.executable, "-c", f"import {module}, sys; print('\\n'.join(sys.modules))"]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    assert module in loaded
    assert not absent & loaded
