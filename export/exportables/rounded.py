"""A model whose weights are rounded: as a graph stores them, and as they are when restored, which is what it is compared with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint, TokenizerFiles
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.kept import kept, kept_forms
from headfold.export.exportables.own import OwnModel
from headfold.export.model.config import ModelConfig
from headfold.export.model.rounding import (
    Form,
    Rounded,
    Width,
    bits_of,
    form_of,
    restored,
    rounded,
    stored_part,
    stored_shapes,
)
from headfold.export.model.smoothing import Exponents, shifted, shifts
from headfold.runtime.errors import BundleError, ConfigError
from headfold.runtime.manifest import WeightsScheme


class ChangedCheckpoint:
    """Another checkpoint with some of its tensors changed; see Checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.original = checkpoint

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
        return self.original.dtype(name)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        return self.original.read(name)

    def quantized(self, name: str) -> QuantizedTensor | None:
        """See Checkpoint."""
        return None

    def kind(self, name: str) -> str | None:
        """See Checkpoint."""
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)


class SmoothedCheckpoint(ChangedCheckpoint):
    """A checkpoint of the same function, with inputs of products that lose less when they are rounded.

    Args:
        checkpoint: as it was.
        exponents: see `headfold.export.model.smoothing`.
    """

    def __init__(self, checkpoint: Checkpoint, exponents: Exponents) -> None:
        super().__init__(checkpoint)
        self.exponents = exponents
        self._shifts = dict[str, list[tuple[int, Tensor]]]()
        for name, axis, powers in shifts(checkpoint.config, exponents):
            self._shifts.setdefault(name, []).append((axis, powers))

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return torch.float32 if name in self._shifts else self.original.dtype(name)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        tensor = self.original.read(name)
        for axis, powers in self._shifts.get(name, ()):
            tensor = shifted(tensor, axis, powers)
        return tensor

    def quantized(self, name: str) -> QuantizedTensor | None:
        """See Checkpoint."""
        return None if name in self._shifts else self.original.quantized(name)

    def kind(self, name: str) -> str | None:
        """See Checkpoint."""
        return self.original.kind(name)


class RoundedCheckpoint(ChangedCheckpoint):
    """A checkpoint some of whose weights have been rounded and restored; see Checkpoint.

    Args:
        checkpoint: as it was.
        bits: of each rounded weight.
        found: those that are rounded already; the others are, to the nearest, as they are read.
        kept: those that the checkpoint holds in few bits itself, and how; see `headfold.export.exportables.kept`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bits: Mapping[str, Width],
        found: Mapping[str, Rounded] | None = None,
        kept: Mapping[str, Form] | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.found, self.kept, shapes = found or {}, kept or {}, checkpoint.shapes()
        self.forms = {name: form_of(width, shapes[name][1]) for name, width in bits.items()} | dict(self.kept)
        self._last: tuple[str, Rounded] | None = None  # a graph asks for numbers and scales one after the other

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return torch.float32 if name in self.forms else self.original.dtype(name)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        return restored(self.rounded(name)) if name in self.forms else self.original.read(name)

    def rounded(self, name: str) -> Rounded:
        """One of the rounded weights.

        Raises:
            BundleError: the checkpoint does not hold it as `kept` says.
        """
        if name in self.found:
            return self.found[name]
        if self._last is None or self._last[0] != name:
            self._last = name, self._made(name)
        return self._last[1]

    def _made(self, name: str) -> Rounded:
        if name not in self.kept:
            return rounded(self.original.read(name), self.forms[name].bits)
        rounding = kept(self.original, name)
        if rounding is None or rounding.form != self.kept[name]:
            raise BundleError(f"{name} is not in {self.path} as the bundle kept it", fix="Export it again.")
        return rounding


class StoredTensors:
    """The weights of a rounded checkpoint as a graph stores them: see Tensors, and `stored_shapes` for their names."""

    def __init__(self, checkpoint: RoundedCheckpoint) -> None:
        self._checkpoint, self.path, self._whole = checkpoint, checkpoint.path, dict[str, str]()
        self._shapes = dict(checkpoint.shapes())
        for name, form in checkpoint.forms.items():
            rows, columns = self._shapes.pop(name)
            parts = stored_shapes(name, form, rows, columns)
            self._shapes |= parts
            self._whole |= dict.fromkeys(parts, name)

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Tensors."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        if name not in self._whole:
            return self._checkpoint.read(name)
        return stored_part(self._checkpoint.rounded(self._whole[name]), name)


def rounded_checkpoint(exportable: Exportable, scheme: WeightsScheme) -> RoundedCheckpoint:
    """The checkpoint behind it, rounded; what it holds in few bits already stays as it is.

    Raises:
        ConfigError: headfold has no table of its family, or nothing in it can be rounded.
    """
    if not isinstance(exportable, OwnModel):
        raise ConfigError(
            "weights are rounded only in families that headfold has a table of",
            where=exportable.path,
            fix="Leave --weights out.",
        )
    checkpoint = exportable.checkpoint
    bits = bits_of(checkpoint.shapes(), scheme)
    forms = kept_forms(checkpoint, [name for name, width in bits.items() if width != 7])
    if not bits:
        raise ConfigError(
            "no weight has blocks of 32 inputs, so none can be rounded",
            where=exportable.path,
            fix="Leave --weights out.",
        )
    left = {name: width for name, width in bits.items() if name not in forms}
    return RoundedCheckpoint(checkpoint, left, kept=forms)
