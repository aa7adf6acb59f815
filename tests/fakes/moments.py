"""What a kill would leave of a directory, at every moment of a function's run: copies of it before each call that changes it.

A process that SIGKILL ends writes nothing more, and its locks go with it: so does a copy's.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headfold.export import files

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []  # of Python's audit events, whose hooks stay for good


@contextmanager
def moments(root: Path, kept: Path, monkeypatch: Any) -> Iterator[list[Path]]:
    """Fills a list with the copies of `root`, below `kept`, while the block runs."""
    copies: list[Path] = []
    if not _listeners:
        sys.addaudithook(lambda event, given: _listeners[-1](event, given) if _listeners else None)

    def copy() -> None:
        heard = _listeners[:]
        _listeners[:] = [lambda event, given: None]
        copies.append(Path(shutil.copytree(root, kept / str(len(copies)), symlinks=True)))
        _listeners[:] = heard

    def hear(event: str, given: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & _WRITES)
        if changes and isinstance(given[0], str | bytes | os.PathLike) and root in Path(os.fsdecode(given[0])).parents:
            copy()

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            copy()
            return function(*given)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(files, "_rename", before(files._rename))  # by ctypes, of which Python tells nothing
        _listeners[:] = [hear]
        try:
            yield copies
        finally:
            _listeners[:] = [lambda event, given: None]
