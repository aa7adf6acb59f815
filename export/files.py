"""Files that survive a crash: what every writer of headfold does before it renames."""

import errno
import os
from pathlib import Path

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
