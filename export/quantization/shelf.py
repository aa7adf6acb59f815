"""Rounded layers on the disk while an export goes on: there they take no memory, and one that was killed goes on where it was.

So does what its weights were measured to cost. A file is named by all that it was made from: nothing made from something else is
taken for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headfold.export.exportables.base import Tensors
from headfold.export.files import sync
from headfold.export.model.rounding import Rounded, Width
from headfold.runtime.errors import BundleError

_VALUES, _SCALES, _WIDE_ROWS = ".values", ".scales", ".wide_rows"


class Shelf(Mapping[str, Rounded]):
    """Where the rounded weights of a model's layers lie, of one layer after the other: those of layers turned to, read when asked for.

    Args:
        directory: what lies there already may be of a run that was killed.
        bits: of all of them.
        made_from: what the layers are made from beside their weights.

    Raises:
        BundleError: a file is damaged.
    """

    def __init__(self, directory: Path, bits: Width, made_from: Iterable[bytes]) -> None:
        self._directory, self._bits, self._key = directory, bits, _key(made_from)
        self._files = dict[str, Path]()  # by weight
        self.found = 0  # layers that lay there already

    def next_layer(self, weights: Mapping[str, Tensor]) -> bool:
        """Turn to the next layer, whose weights these are, and say whether it lies there."""
        for name, weight in weights.items():
            self._key.update(name.encode())
            self._key.update(_bytes(weight))
        if not self._file.is_file():
            return False
        with _opened(self._file) as file:
            stored = [name for name in file.keys() if name.endswith(_VALUES)]  # noqa: SIM118
            there = {name.removesuffix(_VALUES): tuple(file.get_slice(name).get_shape()) for name in stored}
        if not there.items() <= {name: tuple(weight.shape) for name, weight in weights.items()}.items():
            raise BundleError("a rounded layer is another's", where=self._file, fix="Delete it.")
        self._files |= dict.fromkeys(there, self._file)
        self.found += 1
        return True

    def put(self, rounded: Mapping[str, Rounded]) -> None:
        """The rounded weights of the layer turned to, or, before there is one, of those of no layer."""
        parts = {f"{name}{_VALUES}": rounding.values for name, rounding in rounded.items()}
        parts |= {f"{name}{_SCALES}": rounding.scales for name, rounding in rounded.items()}
        parts |= {f"{name}{_WIDE_ROWS}": torch.tensor(rounding.wide_rows) for name, rounding in rounded.items()}
        with _made(self._file) as half_made:
            save_file({name: part.contiguous() for name, part in parts.items()}, half_made)
        self._files |= dict.fromkeys(rounded, self._file)

    @property
    def _file(self) -> Path:
        return self._directory / f"{self._key.hexdigest()}.safetensors"

    def __getitem__(self, name: str) -> Rounded:
        with _opened(self._files[name]) as file:
            values, scales, wide_rows = (file.get_tensor(f"{name}{part}") for part in (_VALUES, _SCALES, _WIDE_ROWS))
        return Rounded(self._bits, values, scales, wide_rows=int(wide_rows))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class InMemory(dict[str, Rounded]):
    """The same of a model whose weights all stay in memory."""

    found = 0

    def next_layer(self, weights: Mapping[str, Tensor]) -> bool:
        """See Shelf."""
        return False

    def put(self, rounded: Mapping[str, Rounded]) -> None:
        """See Shelf."""
        self.update(rounded)


# Of weights that are measured together, by how many first rows had eight bits
_Costs = dict[tuple[str, ...], dict[int, float]]
_STORED = TypeAdapter(list[tuple[tuple[str, ...], dict[int, float]]])


def remembered(directory: Path, made_from: Iterable[bytes], measure: Callable[[], _Costs]) -> _Costs:
    """What was measured here before, of the same, or what now is.

    Raises:
        BundleError: the file is damaged.
    """
    file = directory / f"{_key(made_from).hexdigest()}.json"
    if not file.is_file():
        costs = measure()
        with _made(file) as half_made:
            half_made.write_text(json.dumps(list(costs.items())))
    try:
        return dict(_STORED.validate_json(file.read_bytes()))
    except ValidationError as error:
        raise BundleError("what weights were measured to cost is damaged", where=file, fix="Delete it.") from error


def digest_of(tensors: Tensors) -> bytes:
    """A hash of a model's weights: names, dtypes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors.shapes()):
        weight = tensors.read(name)
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(_bytes(weight))
    return digest.digest()


@contextmanager
def _made(file: Path) -> Iterator[Path]:
    """What to write; it becomes the file at the end of the block."""
    half_made = file.with_suffix(".partial")
    yield half_made
    sync(half_made)
    half_made.replace(file)


def _key(made_from: Iterable[bytes]) -> "hashlib._Hash":
    key = hashlib.sha256()
    for part in made_from:
        key.update(hashlib.sha256(part).digest())
    return key


def _bytes(weight: Tensor) -> memoryview:
    return weight.contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BundleError(f"a rounded layer is damaged: {error}", where=path, fix="Delete it.") from error
