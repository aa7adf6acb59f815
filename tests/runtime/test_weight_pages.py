"""Memory that a block fills moves to huge pages and keeps its contents; what was there before is left alone. So does a mapped file."""

import ctypes
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from headfold.runtime.weight_pages import MOVER, give_back_mapped, huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SIZE = 32 << 20  # bytes


def filled() -> mmap.mmap:
    """Memory of this process alone, in use; not numpy's, which asks for huge pages itself."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(memory, np.int64)[:] = np.arange(SIZE // 8)
    return memory


def all_huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


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
def collapses() -> None:
    """Skips where this kernel has no MADV_COLLAPSE, or no huge pages."""
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    memory = filled()
    address = -(-np.frombuffer(memory, np.uint8).ctypes.data // (2 << 20)) * (2 << 20)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if not mode.exists() or "[never]" in mode.read_text() or madvise(address, 2 << 20, 25) != 0:
        pytest.skip("no huge pages here")


@pytest.mark.usefixtures("collapses")
def test_new_memory_moves_and_old_memory_stays() -> None:
    old = filled()
    before = all_huge_bytes()
    with huge_pages():
        new = filled()
    moved()
    gained = (
        all_huge_bytes() - before
    )  # of twice SIZE; the ends may not be aligned, and the kernel gives pages by itself, too
    assert SIZE - (4 << 20) <= gained <= SIZE + SIZE // 2
    assert all((np.frombuffer(memory, np.int64) == np.arange(SIZE // 8)).all() for memory in (old, new))


@pytest.mark.usefixtures("collapses")
def test_old_memory_stays_where_new_memory_lies_on_both_sides() -> None:
    """The kernel makes one mapping of neighbours."""
    memory = mmap.mmap(-1, 3 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = np.frombuffer(memory, np.int64).reshape(3, -1)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for side in (0, 2):
        assert protect(numbers[side].ctypes.data, SIZE, 0) == 0
    numbers[1] = 1
    before = all_huge_bytes()
    with huge_pages():
        for side in (0, 2):
            assert protect(numbers[side].ctypes.data, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            numbers[side] = side
    moved()
    assert 2 * SIZE - (8 << 20) <= all_huge_bytes() - before <= 2 * SIZE
    assert all((numbers[part] == part).all() for part in range(3))


@pytest.mark.usefixtures("collapses")
def test_memory_that_is_not_in_use_is_not_filled() -> None:
    before = all_huge_bytes()
    with huge_pages():
        empty = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    moved()
    assert all_huge_bytes() == before
    del empty


def test_an_error_in_the_block_comes_through() -> None:
    with pytest.raises(ValueError, match="inside"), huge_pages():
        raise ValueError("inside")


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
