"""Moves a session's weights to huge pages: decode reads all of them for every token, and small pages cost it TLB misses.

Linux only, from 6.1 on. Elsewhere, where /proc is hidden, and where there is no huge page to give, memory stays as it is:
nothing but speed depends on it (`scripts/bench.py` measured what it is worth; see README).
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HUGE = 2 << 20  # bytes; where huge pages are larger, the kernel declines
_COLLAPSE = 25  # MADV_COLLAPSE: at once, and even where huge pages are only for those who ask ("madvise")
_MAPPINGS = Path("/proc/self/smaps")
_FULL = 0.9  # share of a mapping that must be in memory: collapsing an empty one would fill it


@contextmanager
def huge_pages() -> Iterator[None]:
    """What the block allocates and fills is on huge pages after it, wherever that is 2 MiB or more in one piece."""
    before = list(_filled()) if sys.platform == "linux" else []
    yield
    if sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in _filled():
            for low, high in before:  # of a mapping that grew upwards, as the heap does, or downwards: the new part
                start, end = (high if low == start else start), (low if high == end else end)
            start, end = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if end > start:
                madvise(start, end - start, _COLLAPSE)


def _filled() -> Iterator[tuple[int, int]]:
    """Start and end of this process's writable private memory that no file backs, and that is nearly all in use."""
    try:
        lines = _MAPPINGS.read_text().splitlines()
    except OSError:  # sandboxes hide it
        return
    start = end = 0
    for line in lines:
        first, *fields = line.split()
        if not first.endswith(":"):  # address, permissions, offset, device, inode, path
            low, _, high = first.partition("-")
            ours = fields[0] == "rw-p" and (len(fields) < 5 or fields[4] == "[heap]")
            start, end = (int(low, 16), int(high, 16)) if ours else (0, 0)
        elif first == "Rss:" and int(fields[0]) << 10 >= _FULL * (end - start) > 0:
            yield start, end
