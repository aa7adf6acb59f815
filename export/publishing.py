"""Publish a directory or a file so that it is whole or not there: made beside its place, synced to disk, then put there in one step.

A process that is killed leaves the old or the new; what it left half-made is removed by the next one that publishes to the same place,
known by its name and by a lock that nobody holds any more. Nothing that exists is replaced unless the caller says so.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headfold.export.files import CANNOT_WRITE, exchange, lock, rename_without_replacing, sync, sync_tree
from headfold.runtime.errors import HeadfoldError

_STAGE, _ASIDE = ".headfold-stage-", ".headfold-old-"
Check = Callable[[Path], None]  # raises unless the directory may be replaced
Complete = Callable[[Path, Path], None]  # given the old directory and the new one, just before they change places


@contextmanager
def publish(target: Path, replace: Check | None = None, complete: Complete | None = None) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well, and vanishes otherwise.

    Args:
        target: where it goes; a link is followed.
        replace: whether what is there may go; without, nothing that exists, or appears meanwhile, is touched. Called again once the old
            one has moved, since somebody may have put something into it.
        complete: what the new one takes over from the old one; nobody else publishes to `target` meanwhile.

    Raises:
        FileExistsError: `target` exists and `replace` is None.
        OSError: the disk is full or may not be written.
    """
    target = Path(os.path.realpath(target))
    recover(target)
    stage, held = _new_stage(target)
    try:
        yield stage
        if replace is None or not target.exists():
            sync_tree(stage)
            rename_without_replacing(stage, target)
        else:
            _swap(stage, target, replace, complete)
        sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already after a success, or the old directory
        held.close()


def _swap(stage: Path, target: Path, replace: Check, complete: Complete | None) -> None:
    with lock(target):
        replace(target)
        if complete is not None:
            complete(target, stage)
        sync_tree(stage)
        if exchange(stage, target):
            try:
                replace(stage)
            except Exception:
                exchange(stage, target)
                raise
            return
        aside = target.with_name(f"{_ASIDE}{_key(target)}-{secrets.token_hex(8)}")  # `recover` puts it back
        rename_without_replacing(target, aside)
        try:
            rename_without_replacing(stage, target)
            replace(aside)
        except Exception:
            if target.exists():
                target.rename(stage)
            aside.rename(target)
            raise
        shutil.rmtree(aside)


def recover(target: Path) -> None:
    """Undo and remove what killed processes left of publishing to `target`.

    What cannot be removed stays: it is in nobody's way, and another process may be removing it, too.
    """
    key = _key(target)
    if not target.parent.is_dir():
        return
    for aside in target.parent.glob(f"{_ASIDE}{key}-*"):
        with suppress(OSError), lock(aside, wait=False):
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:  # killed between the two renames
                aside.rename(target)
    for stage in target.parent.glob(f"{_STAGE}{key}-*"):
        with suppress(OSError), lock(stage, wait=False):
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def one_line(kind: type[HeadfoldError], where: Path, fix: str) -> Iterator[None]:
    """Turns what a user can mend, a full or read-only disk or a name that is taken, into an error of one line."""
    try:
        yield
    except FileExistsError as error:
        raise kind("already exists", where=where, fix="Choose another place.") from error
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise kind(f"cannot write: {error.strerror or error}", where=where, fix=fix) from error


def publish_file(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `target`, which then takes its place. Raises OSError."""
    target = Path(os.path.realpath(target))
    with scratch(target) as directory:
        stage = directory / "file"
        write(stage)
        sync(stage)
        stage.replace(target)
    sync(target.parent)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A directory beside `target` that is gone afterwards; one that a killed process left goes with the next."""
    recover(target)
    directory, held = _new_stage(target)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        held.close()


class _Held:
    """The lock that says that a stage's process lives."""

    def __init__(self, stage: Path) -> None:
        self._stack = lock(stage, wait=False)
        self._stack.__enter__()

    def close(self) -> None:
        self._stack.__exit__(None, None, None)


def _new_stage(target: Path) -> tuple[Path, _Held]:
    while True:
        stage = target.with_name(f"{_STAGE}{_key(target)}-{secrets.token_hex(8)}")
        stage.mkdir()
        try:
            return stage, _Held(stage)
        except OSError:  # another process took it for a leftover in the moment before it was locked
            if stage.exists():
                raise


def _key(target: Path) -> str:
    """Of the target's name, so that a long one does not become longer."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
