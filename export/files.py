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
    {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}
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
    """Force every file of a directory, and the directory itself, to the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


@contextmanager
def lock(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold a directory: one process at a time, whatever its id and its container; the lock goes with the process.

    Windows has no such locks: there nobody waits, and leftovers are not removed.

    Raises:
        OSError: it is held and `wait` is not set, or it is gone.
    """
    if sys.platform == "win32":
        if not wait:
            raise OSError(errno.EWOULDBLOCK, "no locks on directories here", str(directory))
        yield
        return
    import fcntl

    while True:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if directory.stat().st_ino == os.fstat(descriptor).st_ino:  # not exchanged while we waited
                yield
                return
        finally:
            os.close(descriptor)


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
