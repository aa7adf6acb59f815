"""A model whose weights are rounded: as a graph stores them, and as they are when restored, which is what it is compared with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint, TokenizerFiles
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.model.config import ModelConfig
from headfold.export.model.rounding import Rounded, bits_of, packed, restored, rounded, stored_names
from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import WeightsScheme


class RoundedCheckpoint:
    """A checkpoint some of whose weights have been rounded and restored; see Checkpoint.

    Args:
        checkpoint: as it was.
        bits: of each rounded weight.
        found: those that are rounded already; the others are, to the nearest, as they are read.
    """

    def __init__(
        self, checkpoint: Checkpoint, bits: Mapping[str, Bits], found: Mapping[str, Rounded] | None = None
    ) -> None:
        self.original, self.bits, self.found = checkpoint, bits, found or {}
        self._last: tuple[str, Rounded] | None = None  # a graph asks for numbers and scales one after the other

    @property
    def path(self) -> Path:
        """See Checkpoint."""
        return self.original.path

    @property
    def config(self) -> ModelConfig:
        """See Checkpoint."""
        return self.original.config

    @property
    def tokenizer(self) -> TokenizerFiles:
        """See Checkpoint."""
        return self.original.tokenizer

    @property
    def ignored(self) -> Sequence[str]:
        """See Checkpoint."""
        return self.original.ignored

    @property
    def titles(self) -> Mapping[str, str]:
        """See Checkpoint."""
        return self.original.titles

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return self.original.shapes()

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return torch.float32 if name in self.bits else self.original.dtype(name)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        return restored(*self.rounded(name)) if name in self.bits else self.original.read(name)

    def quantized(self, name: str) -> None:
        """See Checkpoint."""
        return None

    def rounded(self, name: str) -> Rounded:
        """One of the rounded weights."""
        if name in self.found:
            return self.found[name]
        if self._last is None or self._last[0] != name:
            self._last = name, rounded(self.original.read(name), self.bits[name])
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)


class StoredTensors:
    """The weights of a rounded checkpoint as a graph stores them: see Tensors, and `stored_names` for their names."""

    def __init__(self, checkpoint: RoundedCheckpoint) -> None:
        self._checkpoint, self.path = checkpoint, checkpoint.path
        self._parts = {part: name for name, bits in checkpoint.bits.items() for part in stored_names(name, bits)}

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Tensors."""
        shapes = dict(self._checkpoint.shapes())
        for name, bits in self._checkpoint.bits.items():
            rows, columns = shapes.pop(name)
            values, scales = stored_names(name, bits)
            shapes[values] = (rows, columns // BLOCK, BLOCK * bits // 8)
            shapes[scales] = (rows, columns // BLOCK)
        return shapes

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        whole = self._parts.get(name)
        if whole is None:
            return self._checkpoint.read(name)
        values, scales = self._checkpoint.rounded(whole)
        return scales if name.endswith(".scales") else packed(values, self._checkpoint.bits[whole])


def rounded_checkpoint(exportable: Exportable, scheme: WeightsScheme) -> RoundedCheckpoint:
    """The checkpoint behind it, rounded.

    Raises:
        ConfigError: headfold has no table of its family, or nothing in it can be rounded.
    """
    if not isinstance(exportable, OwnModel):
        raise ConfigError(
            "weights are rounded only in families that headfold has a table of",
            where=exportable.path,
            fix="Leave --weights out.",
        )
    bits = bits_of(exportable.checkpoint.shapes(), scheme)
    if not bits:
        raise ConfigError(
            "no weight has blocks of 32 inputs, so none can be rounded",
            where=exportable.path,
            fix="Leave --weights out.",
        )
    return RoundedCheckpoint(exportable.checkpoint, bits)
