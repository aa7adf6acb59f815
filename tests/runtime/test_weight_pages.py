"""Memory that a block fills moves to huge pages and keeps its contents; what was there before is left alone. So does a mapped file."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from headfold.runtime import weight_pages
from headfold.runtime.weight_pages import MOVER, give_back_mapped, huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SIZE = 32 << 20  # bytes
HUGE = 2 << 20


def pages_are_told() -> bool:
    """Sandboxes hide them."""
    try:
        with Path("/proc/self/pagemap").open("rb") as pages:
            return len(pages.read(8)) == 8
    except OSError:
        return False


told = pytest.mark.skipif(not pages_are_told(), reason="/proc/self/pagemap is hidden")


def filled() -> mmap.mmap:
    """Memory of this process alone, in use; not numpy's, which asks for huge pages itself."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(memory, np.int64)[:] = np.arange(SIZE // 8)
    return memory


def moved() -> None:
    """Wait for the thread that moves."""
    for thread in threading.enumerate():
        if thread.name == MOVER:
            thread.join()


def mapped_bytes(path: Path) -> int:
    """Of a file's pages, in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines[at:] if line.startswith("Rss:"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the kernel was asked to move, from and to. What it does then is its own matter: it may have no huge page left."""
    ranges = list[tuple[int, int]]()
    advise = weight_pages._advise

    def noted(found: Sequence[tuple[int, int]], advice: int) -> None:
        assert advice == 25  # MADV_COLLAPSE
        ranges.extend(found)
        advise(found, advice)

    monkeypatch.setattr(weight_pages, "_advise", noted)
    return ranges


def of(memory: mmap.mmap, ranges: Sequence[tuple[int, int]], part: slice = slice(None)) -> int:
    """Bytes of a memory that lie in the ranges."""
    numbers = np.frombuffer(memory, np.int64)[part]
    start, end = numbers.ctypes.data, numbers.ctypes.data + numbers.nbytes
    return sum(max(min(high, end) - max(low, start), 0) for low, high in ranges)


@told
def test_new_memory_moves_and_old_memory_stays(asked: list[tuple[int, int]]) -> None:
    old = filled()
    with huge_pages():
        new = filled()
    moved()
    assert of(new, asked) >= SIZE - 2 * HUGE  # both ends may lie in a huge page that others use
    assert of(old, asked) == 0
    assert all((np.frombuffer(memory, np.int64) == np.arange(SIZE // 8)).all() for memory in (old, new))


@told
@pytest.mark.parametrize("old_part", [1.0, 0.5], ids=["old memory in use", "half in use"])
def test_old_memory_stays_where_new_memory_lies_on_both_sides(old_part: float, asked: list[tuple[int, int]]) -> None:
    """The kernel makes one mapping of neighbours; half of it may be empty before and after."""
    memory = mmap.mmap(-1, 3 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    third = SIZE // 8
    numbers = np.frombuffer(memory, np.int64).reshape(3, third)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for side in (0, 2):
        assert protect(numbers[side].ctypes.data, SIZE, 0) == 0
    numbers[1, : int(third * old_part)] = 1
    with huge_pages():
        for side in (0, 2):
            assert protect(numbers[side].ctypes.data, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            numbers[side] = side
    moved()
    # If half of it is empty, the kernel may have filled its last huge page with its neighbour
    assert of(memory, asked, slice(third, 2 * third)) < (1 if old_part == 1.0 else HUGE)
    assert of(memory, asked) >= 2 * SIZE - 4 * HUGE
    assert all((numbers[part] == part).all() for part in (0, 2))
    assert (numbers[1, : int(third * old_part)] == 1).all()


def test_memory_that_is_not_in_use_is_not_filled(asked: list[tuple[int, int]]) -> None:
    with huge_pages():
        empty = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    moved()
    assert of(empty, asked) == 0


def test_where_proc_is_hidden_memory_stays(
    asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weight_pages, "_PAGES", tmp_path / "nothing")
    with huge_pages():
        new = filled()
    moved()
    assert asked == []
    del new


def test_an_error_in_the_block_comes_through() -> None:
    with pytest.raises(ValueError, match="inside"), huge_pages():
        raise ValueError("inside")


@told
@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_COPY])
def test_a_files_pages_are_given_back_where_nothing_is_lost(access: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = np.arange(1 << 17)  # 1 MiB
    path.write_bytes(content.tobytes())
    link = tmp_path / "link"
    link.symlink_to(path)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=access)
    if access == mmap.ACCESS_COPY:
        memory[:8] = content[:8].tobytes()[::-1][:8]
    seen = bytes(memory)
    held = mapped_bytes(path)
    assert held >= content.nbytes
    give_back_mapped(link)
    assert mapped_bytes(path) == (0 if access == mmap.ACCESS_READ else held)
    assert bytes(memory) == seen
    give_back_mapped(tmp_path / "nothing of this name is mapped")
