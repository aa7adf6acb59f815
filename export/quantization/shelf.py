"""Rounded layers on the disk while an export goes on: there they take no memory, and one that was killed goes on where it was.

A layer's file is named by all that the layer was made from, so nothing that was made from something else is taken for it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headfold.export.files import sync
from headfold.export.model.rounding import Rounded
from headfold.plugins.quantized.schema import Bits
from headfold.runtime.errors import BundleError

_VALUES, _SCALES = ".values", ".scales"


class Shelf:
    """Where the rounded weights of a model's layers lie, of one layer after the other.

    Args:
        directory: what lies there already may be of a run that was killed.
        bits: of all of them.
        made_from: what the layers are made from beside their weights.
    """

    def __init__(self, directory: Path, bits: Bits, made_from: Iterable[bytes]) -> None:
        self._directory, self._bits, self._key = directory, bits, hashlib.sha256()
        for part in made_from:
            self._key.update(hashlib.sha256(part).digest())
        self.found = 0  # layers that lay there already

    def next_layer(self, weights: Mapping[str, Tensor]) -> dict[str, Rounded] | None:
        """Turn to the next layer, whose weights these are: what lies there of it, in the mapped file.

        Raises:
            BundleError: its file is damaged.
        """
        for name, weight in weights.items():
            self._key.update(name.encode())
            self._key.update(weight.contiguous().numpy().data)
        if not self._file.is_file():
            return None
        self.found += 1
        return self._read()

    def put(self, layer: Mapping[str, Rounded]) -> dict[str, Rounded]:
        """The rounded weights of the layer; returns them in the mapped file."""
        parts = {f"{name}{_VALUES}": rounding.values for name, rounding in layer.items()}
        parts |= {f"{name}{_SCALES}": rounding.scales for name, rounding in layer.items()}
        half_made = self._file.with_suffix(".partial")
        save_file({name: part.contiguous() for name, part in parts.items()}, half_made)
        sync(half_made)
        half_made.replace(self._file)
        return self._read()

    @property
    def _file(self) -> Path:
        return self._directory / f"{self._key.hexdigest()}.safetensors"

    def _read(self) -> dict[str, Rounded]:
        try:
            with safe_open(self._file, framework="pt") as file:
                names = [name.removesuffix(_VALUES) for name in file.keys() if name.endswith(_VALUES)]  # noqa: SIM118
                return {
                    name: Rounded(self._bits, file.get_tensor(f"{name}{_VALUES}"), file.get_tensor(f"{name}{_SCALES}"))
                    for name in names
                }
        except SafetensorError as error:
            raise BundleError(f"a rounded layer is damaged: {error}", where=self._file, fix="Delete it.") from error
