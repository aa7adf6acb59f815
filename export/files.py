"""What publishing needs of the operating system: syncing, locks, and renames that replace nothing or exchange two directories."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The disk is full, or may not be written: the user's to mend, so one line and no traceback.
CANNOT_WRITE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EROFS,
        errno.EPERM,
        errno.EBUSY,  # a mount point
        errno.EXDEV,  # a lower layer of an overlay
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
    }
)
_NOT_HERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})  # of this kernel or file system
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2  # of Linux' renameat2
_EXCL, _SWAP = 4, 2  # of macOS' renamex_np


def sync(path: Path) -> None:
    """Force one file or directory to the disk; Windows has no way for a directory."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Force every file of a directory, and the directory itself, to the disk; links are not followed."""
    for path in directory.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(directory)


@contextmanager
def lock(directory: Path) -> Iterator[bool]:
    """Wait for a directory and hold it: one process at a time, whatever its id and its container.

    Yields whether it is held, since Windows and some network file systems have no such locks; on others only processes on the same
    machine see it. The lock goes with the process.

    Raises:
        FileNotFoundError: it is gone.
    """
    with _hold(directory, os.O_RDONLY, wait=True) as held:
        yield held


@contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Make a file and hold it, as `lock` does, but without waiting; other machines see that, too.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: its directory is gone.
    """
    with _hold(path, os.O_RDWR | os.O_CREAT, wait=False) as held:
        yield held


@contextmanager
def _hold(path: Path, flags: int, wait: bool) -> Iterator[bool]:
    if sys.platform == "win32":
        yield False
        return
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            held = _flock(descriptor, wait)
            if os.path.samestat(path.stat(), os.fstat(descriptor)):  # not another one by now
                yield held
                return
        finally:
            os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> bool:
    """False where the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NOT_HERE | {errno.ENOLCK, errno.EBADF}:
            raise
        return False
    return True


def rename_without_replacing(source: Path, target: Path) -> None:
    """Rename a directory to a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    failed = _rename(source, target, _NOREPLACE, _EXCL)
    if failed == 0:
        return
    if failed not in _NOT_HERE:
        raise OSError(failed, os.strerror(failed), str(target))
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)  # of all that may have appeared since, it replaces nothing but an empty directory


def exchange(first: Path, second: Path) -> bool:
    """Have two directories change places, in one step; False where the system cannot."""
    failed = _rename(first, second, _EXCHANGE, _SWAP)
    if failed and failed not in _NOT_HERE:
        raise OSError(failed, os.strerror(failed), str(second))
    return failed == 0


def _rename(source: Path, target: Path, linux: int, mac: int) -> int:
    """Rename with a flag: 0 or an errno."""
    if sys.platform not in ("linux", "darwin"):
        return errno.ENOSYS
    library = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(source), os.fsencode(target))
    try:
        if sys.platform == "darwin":
            done = library.renamex_np(*names, mac)
        else:
            done = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], linux)
    except AttributeError:  # an old C library
        return errno.ENOSYS
    return ctypes.get_errno() if done != 0 else 0
