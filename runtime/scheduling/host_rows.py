"""A KV cache in this process's memory: rows copied and exchanged, and memory that is taken when it is written and given back.

Small pages on purpose: on huge ones a short prompt would take, and zero, the memory of the whole capacity.
"""

import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ANONYMOUS: int | None = getattr(mmap, "MAP_ANONYMOUS", None)  # not on Windows
_GIVE_BACK: int | None = getattr(mmap, "MADV_DONTNEED", None)


def lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros whose memory is taken page by page."""
    size = int(np.prod(shape)) * dtype.itemsize
    if _ANONYMOUS is None or not size:
        return np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | _ANONYMOUS)
    except OSError as error:
        raise MemoryError(size) from error
    return np.frombuffer(memory, dtype).reshape(shape)


class HostRows:
    """Rows of the arrays [B, Hkv, C, D] of `lazy_zeros`."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        self._arrays = list(arrays)

    def read(self, row: int, tokens: int) -> list[NDArray[Any]]:
        """Views of the first tokens of a row, [Hkv, T, D] of each array."""
        return [array[row, :, :tokens] for array in self._arrays]

    def write(self, row: int, parts: Iterable[NDArray[Any]]) -> None:
        """Put what `read` gave into a row."""
        for array, part in zip(self._arrays, parts, strict=True):
            array[row, :, : part.shape[1]] = part

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of one row into another."""
        for array in self._arrays:
            array[target, :, :tokens] = array[source, :, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first tokens of two rows."""
        for array in self._arrays:
            kept = array[one, :, :tokens].copy()
            array[one, :, :tokens] = array[other, :, :tokens]
            array[other, :, :tokens] = kept

    def give_back(self, row: int) -> None:
        """Return the row's memory to the machine, whole pages of it, where that is possible; what it held is lost."""
        for array in self._arrays:
            memory, size = _mapping(array), array[row].nbytes
            if memory is None or _GIVE_BACK is None:
                return
            start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                memory.madvise(_GIVE_BACK, start, end - start)


def _mapping(array: NDArray[Any]) -> mmap.mmap | None:
    """What the array lies in, from its first byte on."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
