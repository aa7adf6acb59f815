"""Open TensorRT or TensorRT-RTX such that a plugin in an ONNX file cannot abort the process.

The RTX parser looks a plugin up through `libtensorrt_rtx.so`, a name that the wheel does not have (only `.so.1`), and aborts when it
is missing. So the parser is loaded first, from a directory of links that has the name: its search path is where it was opened.
"""

import ctypes
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

Flavour = Literal["tensorrt-rtx", "tensorrt"]
MODULES: dict[str, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_LIBRARY, _PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"
_MAPS = Path("/proc/self/maps")  # what this process has loaded
_links: tempfile.TemporaryDirectory[str] | None = (
    None  # the links must live as long as the process: they are opened late
)


class TensorRTMissing(ImportError):
    """This flavour of TensorRT is not installed, or was imported in a way that lets its parser abort the process."""


def open_tensorrt(flavour: Flavour) -> Any:
    """The Python module of a flavour, safe to parse plugins with.

    Raises:
        TensorRTMissing: see there; the message says what to do.
    """
    name = MODULES[flavour]
    if importlib.util.find_spec(name) is None:
        hint = "pip install tensorrt-rtx" if flavour == "tensorrt-rtx" else "pip install tensorrt"
        raise TensorRTMissing(f"{flavour} is not installed: {hint}")
    if flavour == "tensorrt-rtx" and sys.platform == "linux" and _links is None and not _findable():
        if _is_loaded(name):  # from where it does not find the library, and it stays there
            raise TensorRTMissing(
                f"{name} was imported before headfold could load its parser safely: "
                f"call headfold.plugins.tensorrt_library.open_tensorrt before anything imports {name}"
            )
        _preload()
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise TensorRTMissing(f"{flavour} cannot be loaded: {error}") from error


def _is_loaded(name: str) -> bool:
    """Whether this process has the parser already; where /proc is hidden, whether it imported the module."""
    try:
        return _PARSER in _MAPS.read_text()
    except OSError:
        return name in sys.modules


def _wheel() -> Path | None:
    """Where the wheel has its libraries; None for another installation."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _findable() -> bool:
    """Whether the parser finds the library by itself: beside it, or on the loader's search path."""
    wheel = _wheel()
    if wheel is not None:
        return (wheel / _LIBRARY).exists()
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def _preload() -> None:
    global _links
    wheel = _wheel()
    if wheel is None:
        raise TensorRTMissing(f"{_LIBRARY} is not on the library path: add its directory to LD_LIBRARY_PATH")
    links = tempfile.TemporaryDirectory(prefix="headfold-tensorrt-")
    directory = Path(links.name)
    for library in wheel.glob("*.so.*"):
        (directory / library.name).symlink_to(library)
    (directory / _LIBRARY).symlink_to(wheel / f"{_LIBRARY}.1")
    try:
        for library in sorted(directory.glob(f"{_PARSER}.*")):
            ctypes.CDLL(str(library))
    except OSError as error:
        raise TensorRTMissing(f"tensorrt-rtx cannot be loaded: {error}") from error
    _links = links
