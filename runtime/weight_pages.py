"""Where a session's weights lie in memory: on huge pages, since decode reads all of them for every token and small ones cost it TLB
misses; and once, not as the file's pages too.

Linux only, huge pages from 6.1 on. Elsewhere, where /proc is hidden, and where there is no huge page to give, memory stays as it is:
nothing but speed and size depend on it (`scripts/bench.py` measured what huge pages are worth; see README).
"""

import ctypes
import gc
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOVER = "headfold-huge-pages"  # the thread that moves
_HUGE = 2 << 20  # bytes; where huge pages are larger, the kernel declines
_MMAP_THRESHOLD = -3  # glibc's name of a parameter
_LARGE_BLOCK = 4 << 20  # bytes: such blocks go back to the system when they are freed
_COLLAPSE, _DONTNEED = 25, 4  # MADV_COLLAPSE: at once, and even where huge pages are only for those who ask ("madvise")
_MAPPINGS = Path("/proc/self/maps")  # not smaps, which counts every page of the process: 20 to 90 ms
_PAGES = Path("/proc/self/pagemap")  # eight bytes for each small page
_PRESENT, _SWAPPED, _FILES = (np.uint64(1 << bit) for bit in (63, 62, 61))  # of such an entry
_SMALL = _HUGE // mmap.PAGESIZE  # small pages in a huge one
_FULL = _SMALL * 9 // 10  # so many of them must be in memory: collapsing an empty one would fill it
_MOST = 1 << 15  # huge pages: of a larger mapping, most likely a reserve, even what is to read is over 128 MiB


@contextmanager
def huge_pages() -> Iterator[None]:
    """What the block allocates and fills moves to huge pages, wherever it is 2 MiB or more in one piece.

    A thread does it once the block is over, while the memory is in use already: copying a gigabyte takes as long as loading it.
    """
    if sys.platform != "linux":
        yield
        return
    before = _in_use(1)
    yield
    new = np.array(sorted(_in_use(_FULL) - before), np.int64)
    pieces = np.split(new, np.flatnonzero(np.diff(new) != _HUGE) + 1)  # neighbours together: each call has its own cost
    ranges = [(int(piece[0]), int(piece[-1]) + _HUGE) for piece in pieces if piece.size]
    threading.Thread(target=_advise, args=(ranges, _COLLAPSE), name=MOVER, daemon=True).start()


def give_back_mapped(path: Path) -> None:
    """Take a file's pages out of this process's memory, where it has only read them; what is read again comes back from the file.

    ONNX Runtime maps the weights and packs most of them anew for its kernels: the file's pages stay behind, as large as they are.
    """
    if sys.platform == "linux":
        _advise(list(_mapped(path)), _DONTNEED)


def give_back_freed() -> None:
    """Let go of memory that nothing uses: models in cycles with their hooks, and what glibc keeps of freed blocks.

    It keeps larger and larger ones, up to 32 MiB, the more it has seen: from now on only small ones.
    """
    gc.collect()
    c = ctypes.CDLL(None) if sys.platform == "linux" else None
    if c is not None and hasattr(c, "malloc_trim"):  # other C libraries keep little
        c.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
        c.malloc_trim(0)


def _advise(ranges: Sequence[tuple[int, int]], advice: int) -> None:
    """Memory that was freed meanwhile, or that the kernel does not move, is no error."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in ranges:
        madvise(start, end - start, advice)


def _mapped(path: Path) -> Iterator[tuple[int, int]]:
    """Where the file is mapped, and nothing there is other than in the file."""
    wanted = str(path.resolve())
    own = [(x.start, x.end) for x in _mappings() if x.path == wanted]
    for start, end, entries in _entries(own):
        changed = (entries & _SWAPPED != 0) | (entries & (_PRESENT | _FILES) == _PRESENT)
        if not changed.any():
            yield start, end


def _in_use(least: int) -> set[int]:
    """Addresses of the huge pages of which at least so many small ones are in memory, in this process's writable private memory that no
    file backs.

    By pages, not by mappings: the kernel makes one mapping of neighbours, and one that was half in use may be full later.
    """
    private = [x for x in _mappings() if x.permissions == "rw-p" and x.path in ("", "[heap]")]
    whole = [(x.start // _HUGE * _HUGE, -(-x.end // _HUGE) * _HUGE) for x in private]
    found = set[int]()
    for first, _, entries in _entries([(start, end) for start, end in whole if end - start < _MOST * _HUGE]):
        used = np.count_nonzero(entries.reshape(-1, _SMALL) & _PRESENT, axis=1)
        found.update((first + _HUGE * np.flatnonzero(used >= least)).tolist())
    return found


@dataclass
class _Mapping:
    """A piece of this process's memory."""

    start: int
    end: int
    permissions: str
    path: str  # or a name in brackets, or nothing


def _mappings() -> list[_Mapping]:
    try:
        lines = _MAPPINGS.read_text().splitlines()
    except OSError:  # sandboxes hide it
        return []
    found = list[_Mapping]()
    for line in lines:  # address, permissions, offset, device, inode, path
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        low, _, high = addresses.partition("-")
        found.append(_Mapping(int(low, 16), int(high, 16), permissions, "".join(path)))
    return found


def _entries(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, NDArray[np.uint64]]]:
    """Each range, and what the system says of its small pages; nothing where sandboxes hide it."""
    with suppress(OSError), _PAGES.open("rb", buffering=0) as pages:
        for start, end in ranges:
            pages.seek(start // mmap.PAGESIZE * 8)
            count = (end - start) // mmap.PAGESIZE
            entries = np.frombuffer(pages.read(count * 8), np.uint64)
            if len(entries) == count:
                yield start, end, entries
