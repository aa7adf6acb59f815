"""One input is tried, within bounds of time and memory, and what came of it is judged as the command line would say it."""

import contextlib
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import psutil

from fuzzing.kinds import KINDS
from fuzzing.subjects import read
from headfold.export.cli.root import explain
from headfold.runtime.errors import HeadfoldError

CPU_SECONDS = 5
MEMORY_BYTES = 2 << 30
_OURS = 3  # exit code of a bug of ours
_LONGEST_LINE = 2000
_NO_MEMORY = re.compile(
    r"bad.?alloc|MemoryError|(cannot|failed to|can't|unable to) allocate|out of memory", re.IGNORECASE
)


@dataclass(frozen=True)
class Failure:
    """What should not have come of an input: `cause` is the same for all that are one bug, `text` tells more."""

    cause: str
    text: str


class Tries:
    """Tries inputs in a directory of its own, where valid files are and are restored."""

    def __init__(self, subjects: Path, directory: Path) -> None:
        self._valid, self._subjects, self._own = subjects, read(subjects), directory
        self._own.mkdir()
        for name in {kind.subject for kind in KINDS.values()} - {None}:
            shutil.copytree(subjects / str(name), self._own / str(name))

    def attempt(self, kind: str, seed: int, restore: bool = True) -> list[Failure]:
        """Make the input of a seed, use it, and tell of what failed."""
        subject = KINDS[kind].subject or "alone"
        path = self._own / subject
        path.mkdir(exist_ok=True)
        files = KINDS[kind].make(Random(f"{kind} {seed}"), self._subjects)
        for name, data in files.items():
            (path / name).write_bytes(data)
        failures = []
        for use in KINDS[kind].uses:
            start = time.process_time()
            if (failure := judged(use, path / next(iter(files)) if subject == "alone" else path)) is not None:
                failures.append(failure)
            if (took := time.process_time() - start) > CPU_SECONDS:
                failures.append(Failure(f"over {CPU_SECONDS} s in {use.__name__}", f"took {took:.1f} s"))
        for name in files if restore else ():
            (path / name).unlink()
            if (self._valid / subject / name).exists():
                shutil.copy2(self._valid / subject / name, path / name)
        return failures


def judged(use: Callable[[Path], None], path: Path) -> Failure | None:
    """Use a path, and tell what is wrong with how that ended, if anything is."""
    try:
        with warnings.catch_warnings(action="ignore"):
            use(path)
    except KeyboardInterrupt:
        raise
    except HeadfoldError as error:
        causes = [f"{type(cause).__name__}: {cause}" for cause in _chain(error)]
        if any(_NO_MEMORY.search(cause) for cause in causes):
            return _failure(error, f"over {MEMORY_BYTES >> 30} GiB, and said so")
        line = str(error)
        return _failure(error, "an error of more than one line") if len(line) > _LONGEST_LINE or "\n" in line else None
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, Exception) and explain(error)[1] != _OURS:
            return None
        return _failure(error, type(error).__name__)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failure(error: BaseException, what: str) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if re.search(r"/(export|runtime|plugins)/", frame.filename)]
    place = f"{'/'.join(Path(ours[-1].filename).parts[-2:])}, {ours[-1].name}" if ours else "?"
    said = re.sub(r"\d+|'[^']*'|/\S+", "…", " ".join(str(error).split())[:80])
    text = "".join(traceback.format_exception(error))
    return Failure(f"{what} in {place}: {said}", text[:1000] + text[-3000:] if len(text) > 4000 else text)


def serve(connection: Connection, subjects: Path, directory: Path) -> None:
    """In a process of its own: try what comes, and answer, until nothing comes any more."""
    silence()
    tries = Tries(subjects, directory)
    bound_memory()
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            kind, seed = connection.recv()
            connection.send(tries.attempt(kind, seed))


def silence() -> None:
    """What libraries write on the standard streams, panics of Rust too, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # as the command line does
        os.dup2(nowhere, stream.fileno())


def bound_memory() -> None:
    """From here on this process can have MEMORY_BYTES more than it has."""
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
