"""Files that survive a crash: what every writer of headfold does before it renames."""

import errno
import os
import shutil
from pathlib import Path

import psutil

# The disk is full, or may not be written: the user's to mend, so one line and no traceback.
CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM})


def sync(path: Path) -> None:
    """Force one file or directory to the disk."""
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


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Remove what killed processes left half-written: directories that match, and whose names end in `-` and a dead process's id.

    One that cannot be removed stays: it is in nobody's way, and another process may be removing it, too.
    """
    for path in directory.glob(pattern):
        process = path.name.rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)
