"""A look at a GGUF file before the `gguf` package reads it: every length it declares must fit into the file, and into reason.

Layout: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT

from headfold.export.checkpoints.side_files import refuse_pointer
from headfold.runtime.errors import CheckpointError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the scalar types
_STRING, _ARRAY = 8, 9
_UINT32 = 4
_ARCHITECTURE, _ALIGNMENT = b"general.architecture", b"general.alignment"
_LAYOUTS = {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()}  # numbers of a block, and its bytes
_MOST_ELEMENTS, _MOST_FIELDS, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 21, 1 << 16, 1 << 16, 4
_MOST_STRING = 1 << 24  # bytes; a chat template has some thousands


def check_header(path: Path) -> str | None:
    """Walk the header; returns what model it says it is of, `general.architecture`.

    Raises:
        CheckpointError: it is no GGUF file, a pointer of Git LFS, or its lengths are more than it has or than any model needs.
    """
    architecture, alignment = None, GGUF_DEFAULT_ALIGNMENT
    refuse_pointer(path)
    with path.open("rb") as file:
        walk = _Walk(file, path.stat().st_size, path)
        if file.read(4) != b"GGUF":
            raise walk.error("does not begin with GGUF")
        version = walk.number("<I")
        if version in (2 << 24, 3 << 24):
            fix = "Take the one for little-endian machines, or convert it: gguf-py has gguf-convert-endian."
            raise CheckpointError("is big-endian", where=path, fix=fix)
        if version not in (2, 3):
            raise walk.error(f"has version {version}; 2 and 3 are read")
        tensors, fields = walk.count("<Q", _MOST_TENSORS, "tensors"), walk.count("<Q", _MOST_FIELDS, "fields")
        for _ in range(fields):
            name, kind = walk.text(), walk.number("<I")
            if name == _ARCHITECTURE and kind == _STRING:
                architecture = walk.text().decode(errors="replace")
            elif name == _ALIGNMENT and kind == _UINT32:
                alignment = walk.number("<I")
            else:
                walk.value(kind)
        end = 0  # of the tensor before; they follow one another, or one would be read as another
        for _ in range(tensors):
            name = walk.text()
            shape = [walk.number("<Q") for _ in range(walk.count("<I", _MOST_DIMENSIONS, "dimensions"))]
            kind, offset = walk.number("<I"), walk.number("<Q")
            if kind not in _LAYOUTS or not alignment:
                break  # the package refuses it by name
            if offset != end:
                raise walk.error(
                    f"has tensor {name.decode(errors='replace')} at {offset}, not at {end}, where it is next"
                )
            numbers, size = _LAYOUTS[kind]
            end += -(-math.prod(shape) // numbers * size // alignment) * alignment
    return architecture


class _Walk:
    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._size, self._path = file, size, path

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"is no GGUF file, or a damaged one: it {what}", where=self._path, fix="Download it again."
        )

    def number(self, form: str) -> int:
        content = self._file.read(struct.calcsize(form))
        if len(content) < struct.calcsize(form):
            raise self.error("ends in its header")
        return int(struct.unpack(form, content)[0])

    def count(self, form: str, most: int, what: str) -> int:
        number = self.number(form)
        if number > most:
            raise self.error(f"declares {number} {what}")
        return number

    def skip(self, size: int) -> None:
        if self._file.tell() + size > self._size:
            raise self.error("ends in its header")
        self._file.seek(size, 1)

    def string(self) -> None:
        self.skip(self.count("<Q", _MOST_STRING, "bytes of text"))

    def text(self) -> bytes:
        size = self.count("<Q", _MOST_STRING, "bytes of text")
        content = self._file.read(size)
        if len(content) < size:
            raise self.error("ends in its header")
        return content

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            element = self.number("<I")
            number = self.count("<Q", _MOST_ELEMENTS, "elements of an array")
            if element == _STRING:
                for _ in range(number):
                    self.string()
            elif element in _SIZES:
                self.skip(number * _SIZES[element])
            else:
                raise self.error(f"has an array of type {element}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise self.error(f"has a field of type {kind}")
