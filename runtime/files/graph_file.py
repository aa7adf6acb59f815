"""What an ONNX session does not tell of its graph: the shapes of the initializers, read from the file without the onnx package.

A file is nested protobuf messages (protobuf.dev/programming-guides/encoding): key, then a number or a length and so many bytes.
Field numbers are onnx.proto's, which never change.
"""

from collections.abc import Iterator
from pathlib import Path

from headfold.plugins.attention.schema import TABLES
from headfold.runtime.errors import BundleError

_GRAPH, _INITIALIZER, _DIMS, _NAME = 7, 5, 1, 8  # of ModelProto, GraphProto, TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of values


def check_capacity(path: Path, capacity: int) -> None:
    """Hold a capacity in tokens to the rows of the graph's rotary tables, if it has any.

    Raises:
        BundleError: the tables end before, or it is no graph.
    """
    try:
        rows = initializer_shapes(path).get(TABLES[0])
    except ValueError as error:
        raise BundleError(f"is no ONNX graph: {error}", where=path, fix="Export it again.") from error
    if rows and rows[0] < capacity:
        raise BundleError(
            f"its rotary tables cover {rows[0]} tokens, not the manifest's capacity of {capacity}",
            where=path,
            fix="Export it again.",
        )


def initializer_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the main graph's initializers, by name.

    Raises:
        ValueError: it is no protobuf message.
    """
    shapes = {}
    for graph in _messages(memoryview(path.read_bytes()), _GRAPH):
        for tensor in _messages(graph, _INITIALIZER):
            fields = list(_fields(tensor))
            name = b"".join(value for number, value in fields if number == _NAME and not isinstance(value, int))
            dims = [value for number, value in fields if number == _DIMS]
            shapes[name.decode(errors="replace")] = tuple(size for dim in dims for size in _numbers(dim))
    return shapes


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
