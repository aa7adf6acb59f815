"""Publish a directory or a file so that it is whole or not there: made beside its place, synced to disk, then put there in one step.

Work is done in a staging directory beside the target: `new` is what will be published, `old` what it replaces where the two cannot
be exchanged in one step, and `lock` is held by the process that works there, whatever its id and its container. A process that is
killed leaves the old or the new; what it left half-made is undone by the next one that publishes to the same place. Nothing that
exists is replaced unless the caller says so, and nothing is deleted while it is the only copy.
"""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from headfold.export.files import CANNOT_WRITE, exchange, lock, lock_file, rename_without_replacing, sync, sync_tree
from headfold.runtime.errors import HeadfoldError

_STAGING = ".headfold-stage-"
_UNFINISHED = ".headfold-unfinished-"
_NEW, _OLD, _LOCK = "new", "old", "lock"
Check = Callable[[Path], None]  # raises unless the directory may be replaced
Complete = Callable[[Path, Path], None]  # given the old directory and the new one, just before they change places


@contextmanager
def publish(target: Path, replace: Check | None = None, complete: Complete | None = None) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well, and vanishes otherwise.

    Args:
        target: where it goes; a link is followed.
        replace: whether what is there may go; without, nothing that exists, or appears meanwhile, is touched. Called again once the old
            one has moved, since somebody may have put something into it.
        complete: what the new one takes over from the old one, which must be there; nobody else publishes to `target` meanwhile.

    Raises:
        FileExistsError: `target` exists and `replace` is None.
        FileNotFoundError: `target` is gone and `complete` needs it.
        OSError: the disk is full or may not be written.
    """
    target = Path(os.path.realpath(target))
    with _staging(target) as staging:
        new = staging / _NEW
        new.mkdir()
        yield new
        if complete is None and (replace is None or not target.exists()):
            sync_tree(new)
            rename_without_replacing(new, target)
        else:
            _swap(staging, target, replace, complete)
        sync(target.parent)


def _swap(staging: Path, target: Path, replace: Check | None, complete: Complete | None) -> None:
    """Put `new` in the place of `target`. What fails between two renames is put right by `_settle`."""
    new, old = staging / _NEW, staging / _OLD
    check = replace or (lambda _: None)
    with lock(target):
        if complete is not None:
            complete(target, new)
        check(target)
        sync_tree(new)
        if exchange(new, target):
            try:
                check(new)
            except BaseException:
                exchange(new, target)
                raise
            return
        rename_without_replacing(target, old)
        rename_without_replacing(new, target)
        try:
            check(old)
        except BaseException:
            target.rename(new)
            raise


def publish_file(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `target`, which then takes its place. Raises OSError."""
    target = Path(os.path.realpath(target))
    with _staging(target) as staging:
        new = staging / _NEW
        write(new)
        sync(new)
        new.replace(target)
        sync(target.parent)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A directory beside `target` that is gone afterwards; one that a killed process left goes with the next."""
    with _staging(target) as staging:
        (staging / _NEW).mkdir()
        yield staging / _NEW


@contextmanager
def unfinished(target: Path) -> Iterator[Callable[[], Path]]:
    """Yields what makes a directory beside `target` that stays, whatever ends the block, until one ends well: for the next one to
    `target` to go on with.

    Raises:
        BlockingIOError: when it is made while another process has it.
    """
    target = Path(os.path.realpath(target))
    place = target.with_name(f"{_UNFINISHED}{_key(target)}")

    with ExitStack() as leaving:

        @cache
        def make() -> Path:
            place.mkdir(exist_ok=True)
            leaving.enter_context(lock_file(place / _LOCK))
            return place

        yield make
        leaving.close()
        with suppress(OSError), lock_file(place / _LOCK) as held:  # another process has it, or it is not there
            if held:  # as in `recover`
                discard(place)


def discard(directory: Path) -> None:
    """Remove a directory, so that under its name it is whole or gone. Raises OSError."""
    with _staging(directory) as staging:
        directory.rename(staging / _NEW)


def recover(target: Path) -> None:
    """Undo and remove what killed processes left of publishing to `target`.

    What cannot be removed stays: it is in nobody's way, and another process may be removing it, too.
    """
    target = Path(os.path.realpath(target))
    if not target.parent.is_dir():
        return
    for staging in target.parent.glob(f"{_STAGING}{_key(target)}-*"):
        with suppress(OSError):
            with lock_file(staging / _LOCK) as held:
                _put_back(staging, target)
                if not held:  # it may be at work
                    continue
                _settle(staging, target)
            _close(staging)


def check_free(target: Path, kind: type[HeadfoldError]) -> None:
    """Refuse a place that is taken, or where nothing can be, before the work for it; after undoing what killed processes left there."""
    recover(target)
    if target.exists():
        raise kind("already exists", where=target, fix="Choose another place.")
    if not target.absolute().parent.is_dir():
        raise kind("is no directory", where=target.absolute().parent, fix="Create it first.")


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-made in `directory`, whatever it was to become there.

    For a directory whose files are published once under names that do not come again. What had been replaced stays for `recover`.
    """
    for staging in directory.glob(f"{_STAGING}*"):
        with suppress(OSError):
            with lock_file(staging / _LOCK) as held:
                if not held or (staging / _OLD).exists():
                    continue
                _remove(staging / _NEW)
            _close(staging)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A staging directory of this process's own, empty."""
    recover(target)
    with ExitStack() as leaving:
        staging = _take_staging(target, leaving)
        leaving.callback(_settle, staging, target)
        yield staging


def _take_staging(target: Path, leaving: ExitStack) -> Path:
    """A new staging directory that is locked; `leaving` unlocks and removes it."""
    while True:
        staging = target.with_name(f"{_STAGING}{_key(target)}-{secrets.token_hex(8)}")
        leaving.callback(_close, staging)  # before it is made, since an interrupt may come just after
        try:
            staging.mkdir()
        except FileNotFoundError as error:
            if not target.parent.is_dir():
                raise
            raise PermissionError(
                errno.EACCES, "no directory can be made there", target.parent
            ) from error  # as in /proc
        with suppress(BlockingIOError, FileNotFoundError):
            leaving.enter_context(lock_file(staging / _LOCK))
            return staging
        # another process took it for a leftover in the moment before it was locked


def _settle(staging: Path, target: Path) -> None:
    """Put back what a failure left without its place, and remove the rest."""
    _put_back(staging, target)
    new, old = staging / _NEW, staging / _OLD
    if old.exists() and new.exists():  # somebody took the place meanwhile: `old` is the only copy, and stays
        return
    for rest in (new, old):
        _remove(rest)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_back(staging: Path, target: Path) -> None:
    """The old one has moved, and the new one not yet taken its place."""
    if (staging / _OLD).exists() and not target.exists():
        with suppress(FileExistsError):
            rename_without_replacing(staging / _OLD, target)


def _close(staging: Path) -> None:
    """Remove an empty staging directory, after its lock is released: network file systems keep the names of open files."""
    with suppress(OSError):
        if not (staging / _OLD).exists():
            shutil.rmtree(staging)


def _key(target: Path) -> str:
    """Of the target's name, so that a long one does not become longer."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


@contextmanager
def one_line(kind: type[HeadfoldError], where: Path, fix: str) -> Iterator[None]:
    """Turns what a user can mend, a full or read-only disk or a name that is taken, into an error of one line."""
    try:
        yield
    except FileExistsError as error:
        raise kind("already exists", where=where, fix="Choose another place.") from error
    except OSError as error:
        if error.errno not in CANNOT_WRITE | {errno.ENOENT}:  # the latter of /proc, where nobody makes a directory
            raise
        raise kind(f"cannot write: {error.strerror or error}", where=where, fix=fix) from error
