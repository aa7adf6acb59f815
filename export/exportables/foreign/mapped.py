"""Weights that lie in a mapped file give their memory back once they are read: the file still has them.

safetensors maps its files, so a model whose weights need no conversion takes no memory until they are read, and all of it afterwards.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from pathlib import Path

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4 and later; an older one refuses, and nothing is lost


class MappedFiles:
    """Where files were mapped into this process when this was made; none but on Linux."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = [line.split() for line in maps.read_text().splitlines()] if sys.platform == "linux" else []
        ranges = sorted(tuple(int(x, 16) for x in line[0].split("-")) for line in lines if line[4] != "0")  # an inode
        self._starts, self._ends = [x[0] for x in ranges], [x[1] for x in ranges]

    def give_back(self, tensor: Tensor) -> None:
        """Let the pages of a tensor that is in one of the files go; they come again when they are read."""
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.nbytes
        which = bisect_right(self._starts, start) - 1
        if which >= 0 and end <= self._ends[which]:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
