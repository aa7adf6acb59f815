"""Where a session's weights lie in memory: on huge pages, since decode reads all of them for every token and small ones cost it TLB
misses; and once, not as the file's pages too.

Linux only, huge pages from 6.1 on. Elsewhere, where /proc is hidden, and where there is no huge page to give, memory stays as it is:
nothing but speed and size depend on it (`scripts/bench.py` measured what huge pages are worth; see README).
"""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOVER = "headfold-huge-pages"  # the thread that moves
_HUGE = 2 << 20  # bytes; where huge pages are larger, the kernel declines
_MMAP_THRESHOLD = -3  # glibc's name of a parameter
_LARGE_BLOCK = 4 << 20  # bytes: such blocks go back to the system when they are freed
_COLLAPSE, _DONTNEED = 25, 4  # MADV_COLLAPSE: at once, and even where huge pages are only for those who ask ("madvise")
_MAPPINGS = Path("/proc/self/smaps")
_FULL = 0.9  # share of a mapping that must be in memory: collapsing an empty one would fill it


@contextmanager
def huge_pages() -> Iterator[None]:
    """What the block allocates and fills moves to huge pages, wherever it is 2 MiB or more in one piece.

    A thread does it once the block is over, while the memory is in use already: copying a gigabyte takes as long as loading it.
    """
    if sys.platform != "linux":
        yield
        return
    before = list(_filled())
    yield
    ranges = list[tuple[int, int]]()
    for start, end in _filled():
        for low, high in before:  # in order of address; they lie in a mapping that grew upwards, downwards or both
            if start < high and low < end:
                ranges.append(_whole(start, low))
                start = high
        ranges.append(_whole(start, end))
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


def _whole(start: int, end: int) -> tuple[int, int]:
    """The huge pages in it; none if the end is not behind the start."""
    return -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE


def _advise(ranges: Sequence[tuple[int, int]], advice: int) -> None:
    """Memory that was freed meanwhile, or that the kernel does not move, is no error."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in ranges:
        if end > start:
            madvise(start, end - start, advice)


def _mapped(path: Path) -> Iterator[tuple[int, int]]:
    """Where the file is mapped, and nothing there is other than in the file."""
    wanted = str(path.resolve())
    for mapping in _mappings():
        if mapping.path == wanted and mapping.anonymous == 0:
            yield mapping.start, mapping.end


def _filled() -> Iterator[tuple[int, int]]:
    """This process's writable private memory that no file backs, and that is nearly all in use."""
    for mapping in _mappings():
        size = mapping.end - mapping.start
        if mapping.permissions == "rw-p" and mapping.path in ("", "[heap]") and mapping.resident >= _FULL * size > 0:
            yield mapping.start, mapping.end


@dataclass
class _Mapping:
    """A piece of this process's memory."""

    start: int
    end: int
    permissions: str
    path: str  # or a name in brackets, or nothing
    resident: int = 0  # bytes of it in memory
    anonymous: int = 0  # bytes of those that are not a file's


def _mappings() -> list[_Mapping]:
    try:
        lines = _MAPPINGS.read_text().splitlines()
    except OSError:  # sandboxes hide it
        return []
    found: list[_Mapping] = []
    for line in lines:
        first, *fields = line.split(maxsplit=5)
        if not first.endswith(":"):  # address, permissions, offset, device, inode, path
            low, _, high = first.partition("-")
            found.append(_Mapping(int(low, 16), int(high, 16), fields[0], "".join(fields[4:])))
        elif first == "Rss:":
            found[-1].resident = int(fields[0]) << 10
        elif first == "Anonymous:":
            found[-1].anonymous = int(fields[0]) << 10
    return found
