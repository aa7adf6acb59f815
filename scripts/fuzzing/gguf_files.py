"""GGUF files (ggml/docs/gguf.md), written piece by piece so that each number and each length can be wrong."""

import struct
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuzzing.mutations import INTEGERS, ODD, Raw, damaged_bytes

_FORMATS = {
    4: "<I",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}  # by type
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ALIGNMENT = 32
Piece = bytes | tuple[str, Any]  # text and payload, or a number and how it is stored


def gguf_file(rng: Random, metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A file with up to three changes of its metadata, three of its pieces, and damaged bytes; a few have none."""
    metadata = dict(metadata)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        _change(rng, metadata)
    pieces = _pieces(metadata, tensors)
    for _ in range(rng.choice((0, 0, 1, 1, 3))):
        _damage(rng, pieces)
    data = b"".join(piece if isinstance(piece, bytes) else struct.pack(*piece) for piece in pieces)
    return damaged_bytes(rng, data) if rng.random() < 0.2 else data


def _change(rng: Random, metadata: dict[str, Any]) -> None:
    """One change of what the metadata says."""
    key = rng.choice(list(metadata))
    match rng.randrange(6):
        case 0:
            del metadata[key]
        case 1:
            metadata[key] = metadata[rng.choice(list(metadata))]
        case 2 if isinstance(metadata[key], list):
            values = metadata[key]
            metadata[key] = rng.choice(
                (values[:-1], values[:1] * len(values), values * 2, [[v] for v in values[:9]], [])
            )
        case 3 if isinstance(metadata[key], int):
            metadata[key] = rng.choice((metadata[key] + 1, metadata[key] * 2, 0))
        case _:
            odd = rng.choice(ODD)
            metadata[key] = 7 if isinstance(odd, Raw | dict | None) else odd
    if not metadata:
        metadata["x"] = 1


def _pieces(metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> list[Piece]:
    pieces: list[Piece] = [b"GGUF", ("<I", 3), ("<Q", len(tensors)), ("<Q", len(metadata))]
    for key, value in metadata.items():
        kind = _kind(value)
        pieces += [*_text(key), ("<I", kind), *_value(value, kind)]
    offset = 0
    for name, values in tensors.items():
        pieces += [
            *_text(name),
            ("<I", values.ndim),
            *(("<Q", size) for size in values.shape[::-1]),
            ("<I", 0),
            ("<Q", offset),
        ]
        offset += values.nbytes + -values.nbytes % _ALIGNMENT
    size = sum(len(piece) if isinstance(piece, bytes) else struct.calcsize(piece[0]) for piece in pieces)
    pieces.append(bytes(-size % _ALIGNMENT))
    pieces += [values.tobytes() + bytes(-values.nbytes % _ALIGNMENT) for values in tensors.values()]
    return pieces


def _damage(rng: Random, pieces: list[Piece]) -> None:
    """One wrong number, or a piece too few or too many. The head of the file is as likely as all of its arrays."""
    at = rng.randrange(min(len(pieces), rng.choice((8, 200, len(pieces)))))
    piece = pieces[at]
    if rng.random() < 0.15:
        pieces[at : at + 1] = rng.choice(([], [piece, piece], [b"\0" * rng.choice(INTEGERS[:12])]))
    elif isinstance(piece, bytes):
        pieces[at] = damaged_bytes(rng, piece)
    elif piece[0] in ("<f", "<d"):
        pieces[at] = (piece[0], rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-40)))
    else:
        bits = 8 * struct.calcsize(piece[0])
        number = rng.choice((*INTEGERS, int(piece[1]) + 1, int(piece[1]) - 1)) % (1 << bits)
        pieces[at] = (piece[0].upper().replace("?", "B"), number)


def _kind(value: Any) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            return _UINT32 if 0 <= value < 1 << 32 else 10 if value >= 0 else 11
        case float():
            return _FLOAT32 if abs(value) < 1e38 else 12
        case list():
            return _ARRAY
        case _:
            return _STRING


def _value(value: Any, kind: int) -> list[Piece]:
    if kind == _STRING:
        return _text(str(value))
    if kind == _ARRAY:
        inner = _kind(value[0]) if value else _STRING
        items = [item for item in value if _kind(item) == inner]
        return [("<I", inner), ("<Q", len(items)), *(piece for item in items for piece in _value(item, inner))]
    if isinstance(value, int) and not isinstance(value, bool):
        bits = 8 * struct.calcsize(_FORMATS[kind])
        return [(_FORMATS[10] if bits == 64 else _FORMATS[kind], value % (1 << bits))]
    return [(_FORMATS[kind], value)]


def _text(text: str) -> list[Piece]:
    data = text.encode(errors="surrogatepass")
    return [("<Q", len(data)), data]
