"""SHA-256 of large files, remembered on this machine: one holds for as long as the system says that its file was not touched.

A file is known by device, inode, size and the times of its last write and last change, the second of which no program can set. Small
files, which include all that is parsed, are hashed every time. What is remembered lies in the user's cache directory and is a
convenience: where it is missing, damaged, or cannot be written, files are hashed anew, and nothing else changes.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from headfold.runtime.manifest import Sha256, sha256

_LARGE = 4 << 20  # bytes; below, hashing takes milliseconds
# Nanoseconds: a tick of the coarsest file system's clock. Of two changes within one, the second leaves no trace.
_SETTLED = 2 * 10**9
_MOST_BYTES = 1 << 20  # of what is remembered of one bundle
_Facts = tuple[int, int, int, int, int]  # device, inode, size, last write, last change
_RECORDS = TypeAdapter(dict[str, tuple[_Facts, Sha256]])


class KnownFiles:
    """Of one bundle."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._record = _folder() / f"{hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()}.json"
        self._old = _read(self._record)
        self._now: dict[str, tuple[_Facts, str]] = {}

    def __call__(self, path: Path) -> str:
        """The SHA-256 of a file of the bundle."""
        before = _facts(path)
        if before[2] < _LARGE:
            return sha256(path)
        name = path.relative_to(self._bundle).as_posix()
        known = self._old.get(name)
        if known is not None and known[0] == before:
            self._now[name] = known
            return known[1]
        start = time.time_ns()
        found = sha256(path)
        if _facts(path) == before and max(before[3:]) < start - _SETTLED:
            self._now[name] = before, found
        return found

    def remember(self) -> None:
        """Keep what was found for the next time, if that is possible and new."""
        if self._now == self._old:
            return
        stage = self._record.with_name(f".{self._record.name}.{secrets.token_hex(8)}.partial")
        try:
            stage.parent.mkdir(parents=True, exist_ok=True)
            stage.write_text(json.dumps(self._now))
            stage.replace(self._record)
        except OSError:  # a read-only home, a full disk: then it is hashed again the next time
            with contextlib.suppress(OSError):
                stage.unlink(missing_ok=True)


@contextlib.contextmanager
def known_files(bundle: Path) -> Iterator[KnownFiles]:
    """What is found in the block is remembered, unless the block raises."""
    known = KnownFiles(bundle)
    yield known
    known.remember()


def _folder() -> Path:
    """Who has no home has none: nothing lies below a device."""
    with contextlib.suppress(RuntimeError):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if cache.is_absolute():
            return cache / "headfold" / "sha256"
    return Path(os.devnull) / "sha256"


def _facts(path: Path) -> _Facts:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(record: Path) -> dict[str, tuple[_Facts, str]]:
    try:
        with record.open("rb") as file:
            return _RECORDS.validate_json(file.read(_MOST_BYTES))
    except (OSError, ValidationError):  # there is none, or it is damaged
        return {}
