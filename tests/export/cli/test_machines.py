"""Machines that lack something: a package, a file of /proc, a module of Python, a character, a feature of rich."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from headfold.export.progress import Reporter
from headfold.plugins import tensorrt_library
from headfold.runtime import cpu, weight_pages

LACKING = """
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lacking())
"""


def python(code: str, lacking: set[str] = frozenset(), **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs code where these modules are not installed."""
    import os

    command = [sys.executable, "-c", LACKING.format(lacking=set(lacking)) + code]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)


def headfold(
    *arguments: str, lacking: set[str] = frozenset(), **environment: str
) -> subprocess.CompletedProcess[bytes]:
    code = f"from headfold.export.cli import main; main({[str(a) for a in arguments]!r}, prog_name='headfold')"
    return python(code, lacking, **environment)


COMMANDS = {
    "export": (["export", "CHECKPOINT", "-o", "OUT", "-q"], {"torch"}, "export"),
    "verify": (["verify", "BUNDLE", "--against", "CHECKPOINT", "-q"], {"polygraphy"}, "export"),
    "serve": (["serve", "BUNDLE"], {"fastapi"}, "serve"),
    "serve with": (["serve", "BUNDLE"], {"onnxruntime"}, "ort"),
    "chat": (["chat", "BUNDLE"], {"onnxruntime"}, "ort"),
    "study": (["study", "glu", "--data", "x.txt"], {"accelerate"}, "train"),
    "families": (["families"], {"rich"}, "export"),
    "generate": (["generate", "BUNDLE", "hi"], {"onnxruntime"}, "ort"),
    "inspect a checkpoint": (["inspect", "CHECKPOINT"], {"torch"}, "export"),
    "run": (["generate", "BUNDLE", "hi"], {"tokenizers"}, ""),
    "build": (["build", "BUNDLE", "-q"], {"onnx_ir"}, "export"),
    "convert": (["convert", "CHECKPOINT", "-o", "OUT", "--kv-heads", "1", "-q"], {"safetensors"}, "export"),
    "uptrain": (["uptrain", "CHECKPOINT", "-o", "OUT", "--data", "x.txt", "--tokens", "99"], {"accelerate"}, "train"),
    "sweep": (
        ["sweep", "CHECKPOINT", "-o", "OUT", "--kv-heads", "1", "--data", "x.txt", "--tokens", "9"],
        {"torch"},
        "export",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(
    command, toy_bundle, toy_checkpoint, tmp_path
) -> None:
    arguments, lacking, extra = COMMANDS[command]
    (tmp_path / "x.txt").write_text("the fox " * 99)
    places = {"CHECKPOINT": toy_checkpoint, "BUNDLE": toy_bundle, "OUT": tmp_path / "out", "x.txt": tmp_path / "x.txt"}
    result = headfold(*(places.get(a, a) for a in arguments), lacking=lacking)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1
    assert (f'pip install "headfold[{extra}]"' if extra else "pip install headfold.") in lines[0]
    assert next(iter(lacking)) in lines[0]


def test_serving_inspecting_and_packaging_a_bundle_need_no_extra_of_export(toy_bundle, tmp_path) -> None:
    lacking = {"torch", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors", "gguf", "transformers"}
    assert headfold("generate", toy_bundle, "hi", "-n", "1", lacking=lacking).returncode == 0
    assert headfold("inspect", toy_bundle, lacking=lacking | {"onnxruntime"}).returncode == 0
    package = ("package", toy_bundle, "--for", "kserve", "-o", tmp_path / "packages")
    result = headfold(*package, lacking=lacking | {"onnxruntime", "rich", "fastapi"})
    assert result.returncode == 0, result.stderr


def test_every_module_imports_where_python_has_no_unix() -> None:
    """As on Windows."""
    code = """
import importlib, pkgutil, headfold.export, headfold.plugins, headfold.runtime
unix, lacking = {"resource", "fcntl", "pwd", "grp", "termios"}, sys.meta_path.pop(0)
packages = (headfold.export, headfold.plugins, headfold.runtime)
names = [m.name for package in packages for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for blocked in (False, True):  # first everybody else's modules, which know Windows themselves
    for name in [name for name in sys.modules if name in unix or name.startswith("headfold.")]:
        del sys.modules[name]
    if blocked:
        sys.meta_path.insert(0, lacking)
    for name in names:
        if not name.endswith(("__main__", "triton_kernels", "kernel_worker")):
            importlib.import_module(name)
"""
    result = python(code, {"resource", "fcntl", "pwd", "grp", "termios"})
    assert result.returncode == 0, result.stderr.decode()


def test_proc_may_be_hidden(tmp_path, monkeypatch) -> None:
    from headfold.export.bundle import pipeline

    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(weight_pages, "_MAPPINGS", nowhere)
    with weight_pages.huge_pages():
        pass
    monkeypatch.setattr(tensorrt_library, "_MAPS", nowhere)
    assert not tensorrt_library._is_loaded("no_such_module")
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", nowhere)
    assert cpu.physical_cores() >= 1
    monkeypatch.setattr(pipeline, "_STATUS", nowhere)
    assert pipeline._peak_memory() > 10 << 20


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_the_output_has_not_are_replaced(encoding, toy_bundle, tmp_path) -> None:
    place = tmp_path / "世界🦊"
    place.symlink_to(toy_bundle)
    for arguments in (["inspect", place], ["inspect", place, "--json"], ["inspect", tmp_path / "🦊"]):
        result = headfold(*arguments, PYTHONIOENCODING=encoding)
        assert result.returncode == (2 if arguments[-1] == tmp_path / "🦊" else 0), result.stderr
        assert b"Traceback" not in result.stderr


def test_standard_input_that_is_no_text(toy_bundle) -> None:
    code = f"from headfold.export.cli import main; main(['generate', {str(toy_bundle)!r}, '-'])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, input=b"\xff\xfe\xfa", capture_output=True, check=False)
    assert result.returncode in (0, 2)  # 0 where Python's locale takes any byte
    assert len(result.stderr.splitlines()) <= 1


def test_steps_within_steps_share_one_live_display(monkeypatch) -> None:
    """rich 14.0 has one per console and raises at the second; later ones nest."""
    from rich import progress

    live = []

    class OldProgress(progress.Progress):
        def start(self) -> None:
            assert not live
            live.append(self)
            super().start()

        def stop(self) -> None:
            super().stop()
            live.clear()

    monkeypatch.setattr("headfold.export.progress.Progress", OldProgress)
    output = io.StringIO()
    reporter = Reporter(Console(file=output, force_terminal=True))
    with reporter.step("outer", 2) as outer, reporter.step("inner", 2) as inner:
        inner(1)
        outer(1)
    with reporter.step("next"):
        pass
    assert [word for word in ("outer: ", "inner: ", "next: ") if word in output.getvalue()] == [
        "outer: ",
        "inner: ",
        "next: ",
    ]
