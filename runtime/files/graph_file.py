"""What an ONNX session does not tell of its graph's initializers, read from the file without the onnx package.

A file is nested protobuf messages (protobuf.dev/programming-guides/encoding): key, then a number or a length and so many bytes.
Field numbers are onnx.proto's, which never change.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.attention.schema import SCALES, TABLES
from headfold.plugins.names import scale_name
from headfold.runtime.errors import BundleError

_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, GraphProto
_DIMS, _KIND, _NAME, _RAW = 1, 2, 8, 9  # of TensorProto
_FLOAT32 = 1  # a kind
_AGAIN = "Export it again."
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of values


def check_capacity(path: Path, capacity: int) -> None:
    """Hold a capacity in tokens to the rows of the graph's rotary tables, if it has any.

    Raises:
        BundleError: the tables end before, or it is no graph.
    """
    try:
        rows = initializer_shapes(path).get(TABLES[0])
    except ValueError as error:
        raise BundleError(f"is no ONNX graph: {error}", where=path, fix=_AGAIN) from error
    if rows and rows[0] < capacity:
        raise BundleError(
            f"its rotary tables cover {rows[0]} tokens, not the manifest's capacity of {capacity}",
            where=path,
            fix=_AGAIN,
        )


def cache_scales(path: Path, heads: list[int]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Of each layer of a quantized cache the scales of its keys and its values, [Hkv] each; `heads` are the layers' Hkv.

    Raises:
        BundleError: one is missing, or is no positive number for each head.
    """
    wanted = {scale_name(layer, part): count for layer, count in enumerate(heads) for part in SCALES}
    found = dict[str, NDArray[np.float32]]()
    try:
        for tensor in _initializers(path):
            fields = list(_fields(tensor))
            name = _name(fields)
            if name in wanted and (_KIND, _FLOAT32) in fields:
                found[name] = np.frombuffer(_bytes(fields, _RAW), "<f4")
    except ValueError as error:
        raise BundleError(f"is no ONNX graph: {error}", where=path, fix=_AGAIN) from error
    for name, count in wanted.items():
        scales = found.get(name)
        if scales is None or scales.shape != (count,) or not (np.isfinite(scales) & (scales > 0)).all():
            raise BundleError(f"{name} is no scale for each of {count} heads", where=path, fix=_AGAIN)
    key, value = SCALES
    return [(found[scale_name(layer, key)], found[scale_name(layer, value)]) for layer in range(len(heads))]


def initializer_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the main graph's initializers, by name.

    Raises:
        ValueError: it is no protobuf message.
    """
    shapes = {}
    for tensor in _initializers(path):
        fields = list(_fields(tensor))
        dims = [value for number, value in fields if number == _DIMS]
        shapes[_name(fields)] = tuple(size for dim in dims for size in _numbers(dim))
    return shapes


def _initializers(path: Path) -> Iterator[memoryview]:
    for graph in _messages(memoryview(path.read_bytes()), _GRAPH):
        yield from _messages(graph, _INITIALIZER)


def _name(fields: list[tuple[int, int | memoryview]]) -> str:
    return _bytes(fields, _NAME).decode(errors="replace")


def _bytes(fields: list[tuple[int, int | memoryview]], wanted: int) -> bytes:
    return b"".join(value for number, value in fields if number == wanted and not isinstance(value, int))


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(data) if number == wanted and isinstance(value, memoryview))


def _numbers(dim: int | memoryview) -> Iterator[int]:
    """Dimensions come one by one, or packed into one field."""
    if isinstance(dim, int):
        yield dim
        return
    at = 0
    while at < len(dim):
        number, at = _varint(dim, at)
        yield number


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if key & 7 == _BYTES:
            size, at = _varint(data, at)
        elif key & 7 in (_FIXED64, _FIXED32):
            size = 8 if key & 7 == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {key & 7}")
        if size > len(data) - at:
            raise ValueError("a field is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")
