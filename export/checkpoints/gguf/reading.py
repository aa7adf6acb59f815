"""A GGUF file as it lies there, in one part or several: its metadata, and its tensors, mapped and dequantized by the `gguf` package."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from headfold.export.checkpoints.gguf.header import check_header
from headfold.runtime.errors import CheckpointError, HeadfoldError

_SPLIT, _MOST_PARTS = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf"), 1024  # as llama.cpp's gguf-split names them
_AGAIN = "Download it again."
FLOATS = {  # what is not quantized
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_AT_ONCE = 1 << 22  # numbers that are dequantized together: the package takes twice their memory beside


class GGUFFile:
    """Metadata by key, of the first part; tensors by name, of all.

    Raises:
        CheckpointError: it is no such file, it is damaged, or a part of it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        readers = [_reader(part) for part in _parts(path)]
        self.split = len(readers) > 1
        self.tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        with makes_sense(path):
            self.metadata: Mapping[str, Any] = {name: x.contents() for name, x in readers[0].fields.items()}
            parts = int(self.metadata.get("split.count", 0))  # 0 of a file that was never split
        if parts > 1 and parts != len(readers):
            raise CheckpointError(
                f"is one of {parts} parts (its split.count), and its name does not lead to the others",
                where=path,
                fix=f"Name all parts as they were: NAME-00001-of-{parts:05}.gguf and so on.",
            )

    @property
    def titles(self) -> dict[str, str]:
        """What a person calls its quantization: the most frequent one; nothing where there is none."""
        kinds = Counter(tensor.tensor_type for tensor in self.tensors.values() if tensor.tensor_type not in FLOATS)
        return {"quantization": f"GGUF {kinds.most_common(1)[0][0].name}"} if kinds else {}

    def dequantized(self, tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
        """One of its tensors, as the file has it.

        Raises:
            CheckpointError: the `gguf` package cannot dequantize it.
        """
        try:
            values = np.empty([int(size) for size in tensor.shape[::-1]], np.float32)
            stored = tensor.data.reshape(-1, tensor.data.shape[-1])
            rows = values.reshape(len(stored), -1)
            step = max(_AT_ONCE // max(rows.shape[1], 1), 1)
            for start in range(0, len(stored), step):
                with np.errstate(all="ignore"):  # whoever needs numbers says which tensor holds none
                    rows[start : start + step] = gguf.dequantize(stored[start : start + step], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"tensor {tensor.name}: quantization {tensor.tensor_type.name} cannot be read",
                where=self.path,
                fix="Take a file of another quantization, such as Q8_0 or F16.",
            ) from error
        return values


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Reads a vocabulary of a quarter of a million in 2 s, not 9: every slice of a numpy.memmap is dear, of a view of it cheap."""

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, value: NDArray[np.uint8]) -> None:
        self._data = value.view(np.ndarray)


def _reader(path: Path) -> gguf.GGUFReader:
    check_header(path)
    try:
        return _Reader(path)
    except Exception as error:  # it raises whatever numpy does when a length is nonsense
        raise CheckpointError(f"is no GGUF file, or a damaged one: {error}", where=path, fix=_AGAIN) from error


@contextmanager
def makes_sense(path: Path) -> Iterator[None]:
    """A value of another type than the specification has it raises anything: here it is the file's fault."""
    try:
        yield
    except HeadfoldError:
        raise
    except Exception as error:
        raise CheckpointError(f"has metadata that makes no sense: {error}", where=path, fix=_AGAIN) from error


def _parts(path: Path) -> list[Path]:
    """The files of a split model, of which `path` may be any, first one first; metadata is in that one.

    Raises:
        CheckpointError: a part is missing.
    """
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    base, _, count = found.groups()
    if int(count) > _MOST_PARTS:
        raise CheckpointError(f"is one of {int(count)} parts", where=path, fix=f"At most {_MOST_PARTS} are read.")
    parts = [path.with_name(f"{base}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"is one of {len(parts)} parts, and {missing[0]} is missing", where=path, fix="Put all parts beside it."
        )
    return parts
