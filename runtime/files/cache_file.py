"""Keys and values of a text's tokens in a file, which is a safetensors file with one layout only, so nothing in it has to be believed.

The header of a file that is read must be, byte for byte, the one that would be written for its tokens and this bundle.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.dtypes import DTYPES
from headfold.runtime.errors import InputError
from headfold.runtime.manifest import MODEL, Manifest

_FORMAT = "headfold cache 1"
_LENGTH_BYTES = 8  # of the header, little-endian, in front of it
_TOKENS = "token_ids"
_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
}
_FIX = "Save it again, from this bundle."
_LONGEST_DIGEST = 64


class CacheFile:
    """Reads and writes such files for one bundle, or for one and another that reads its prompts."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifest = manifests[0]
        weights = {
            role + name: file.sha256
            for role, manifest in zip(("", "prefill "), manifests, strict=False)
            for name, file in manifest.files.items()
            if name.startswith(MODEL)
        }
        self._bundle = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path, ids: NDArray[np.int64], arrays: Sequence[NDArray[Any]]) -> None:
        """Tokens [T], and of each cache tensor, in the manifest's order, [Hkv, T, D]. Raises InputError: it cannot be written."""
        parts = [np.ascontiguousarray(array) for array in (ids, *arrays)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.data)
        header = self._header(len(ids), digest.hexdigest())
        stage = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with stage.open("wb") as file:
                file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
                for part in parts:
                    file.write(part.data)
                file.flush()
                os.fsync(file.fileno())
            stage.replace(path)
        except OSError as error:
            stage.unlink(missing_ok=True)
            raise InputError(f"cannot be written: {error.strerror}", where=path, fix="Choose another place.") from error

    def read(self, path: Path, most: int) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
        """What was written: at most so many tokens.

        Raises:
            InputError: it is no such file, is of another bundle, is damaged, or has more tokens.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                empty = len(self._header(0, "0" * _LONGEST_DIGEST)) + _LENGTH_BYTES
                start = file.read(min(size, 2 * empty))
                count, digest = self._facts(path, start)
                header = self._header(count, digest)
                begin = _LENGTH_BYTES + len(header)
                if not 0 < count <= most:
                    raise InputError(
                        f"has {count} tokens, and {most} fit", where=path, fix="Load the bundle with more room."
                    )
                specs = self._specs(count)
                whole = begin + sum(int(np.prod(shape)) * DTYPES[dtype].size for _, dtype, shape in specs)
                if start[:begin] != len(header).to_bytes(_LENGTH_BYTES, "little") + header or size != whole:
                    raise InputError("is damaged, or no cache of this bundle", where=path, fix=_FIX)
                file.seek(begin)
                found, seen = [], hashlib.sha256()
                for _, dtype, shape in specs:
                    array = np.empty(shape, DTYPES[dtype].numpy)
                    if file.readinto(array.data.cast("B")) != array.nbytes:
                        raise InputError("ends too soon", where=path, fix=_FIX)
                    seen.update(array.data)
                    found.append(array)
        except OSError as error:
            raise InputError(
                f"cannot be read: {error.strerror}", where=path, fix="Name a file that was saved."
            ) from error
        ids = found[0]
        if seen.hexdigest() != digest or ids.min() < 0 or ids.max() >= self._manifest.vocab_size:
            raise InputError("does not have the SHA-256 that it says", where=path, fix=_FIX)
        return ids, found[1:]

    def _facts(self, path: Path, start: bytes) -> tuple[int, str]:
        """The tokens and the digest that a header claims, in bounds."""
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        try:
            told = json.loads(start[_LENGTH_BYTES : _LENGTH_BYTES + length])["__metadata__"]
            count, digest, bundle = int(told["tokens"]), str(told["sha256"]), told["bundle"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("is no saved cache", where=path, fix="Name a file that was saved.") from error
        if bundle != self._bundle:
            raise InputError("is of another bundle", where=path, fix=_FIX)
        return min(max(count, 0), 1 << 31), digest[:_LONGEST_DIGEST]

    def _specs(self, count: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of everything in a file of `count` tokens."""
        manifest = self._manifest
        tensors = [
            (past, manifest.cache_dtype, (heads, count, size))
            for (past, _), (heads, size) in manifest.cache.tensors.items()
        ]
        return [(_TOKENS, "int64", (count,)), *tensors]

    def _header(self, count: int, digest: str) -> bytes:
        content: dict[str, Any] = {
            "__metadata__": {"format": _FORMAT, "bundle": self._bundle, "tokens": str(count), "sha256": digest}
        }
        end = 0
        for name, dtype, shape in self._specs(count):
            begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype].size
            content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(content, separators=(",", ":")).encode()
        return header + b" " * (-len(header) % 8)
