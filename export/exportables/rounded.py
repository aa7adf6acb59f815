"""A model whose weights are rounded: as a graph stores them, and as they are when restored, which is what it is compared with."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint, TokenizerFiles
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.exportables.base import Tensors
from headfold.export.exportables.kept import kept
from headfold.export.model.config import ModelConfig
from headfold.export.model.rounding import Form, Rounded, Width, as_rounded, restored, rounded
from headfold.export.model.smoothing import Exponents, shifted, shifts
from headfold.export.model.storing import stored_part, stored_shapes
from headfold.runtime.errors import BundleError


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


class RoundedTensors:
    """A model's weights, some of which have been rounded and restored; see Changed.

    Args:
        tensors: as they were.
        forms: of each rounded weight.
        found: those that are rounded already; the others are, to the nearest, as they are read.
        scales: the dtype of their scales in a graph, but of narrow ones; see Form.
    """

    kept: Mapping[str, Form] = MappingProxyType({})

    def __init__(
        self,
        tensors: Tensors,
        forms: Mapping[str, Form],
        found: Mapping[str, Rounded] | None = None,
        scales: torch.dtype = torch.float32,
    ) -> None:
        self.original: Tensors = tensors
        self.forms, self.found, self.scales = dict(forms), found or {}, scales
        self._last: tuple[str, Rounded] | None = None  # a graph asks for numbers and scales one after the other

    @property
    def path(self) -> Path:
        """See Tensors."""
        return self.original.path

    @property
    def changed(self) -> Collection[str]:
        """See Changed."""
        return self.forms

    @property
    def average_bits(self) -> float:
        """Of a rounded weight's numbers; scales not counted."""
        shapes = {name: self.shapes()[name] for name in self.forms}
        return sum(form.size(shapes[name]) for name, form in self.forms.items()) / sum(map(math.prod, shapes.values()))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Tensors."""
        return self.original.shapes()

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        if name not in self.forms:
            return self.original.read(name)
        self._last = None  # who reads one whole asks for no parts of another, and it may be large
        if name in self.found or name in self.kept:
            return restored(self.rounded(name))
        return as_rounded(self.original.read(name), *self._rule(name))

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows, int64 [n], ascending, of a weight [N, K] whose rows know nothing of each other: of any but those of float4."""
        if name not in self.forms:
            return self.original.read(name)[rows]
        if name in self.found or name in self.kept:
            return restored(self.rounded(name).rows(rows))
        bits, scales, _, block, wide_rows = self._rule(name)
        wide = int((rows < wide_rows).sum())
        return as_rounded(self.original.read(name)[rows], bits, scales, block=block, wide_rows=wide)

    def rounded(self, name: str) -> Rounded:
        """One of the rounded weights."""
        if name in self.found:
            return self.found[name]
        if self._last is None or self._last[0] != name:
            self._last = name, self.made(name)
        return self._last[1]

    def made(self, name: str) -> Rounded:
        """One that is not found already."""
        return rounded(self.original.read(name), *self._rule(name))

    def _rule(self, name: str) -> tuple[Width, torch.dtype, bool, int, int]:
        """How the nearest numbers are found: what `headfold.export.model.rounding.rounded` takes beside the weight."""
        form = self.forms[name]
        return form.bits, self.scales_of(name), form.transposed, form.block, form.wide_rows

    def scales_of(self, name: str) -> torch.dtype:
        """The dtype of a rounded weight's scales."""
        return torch.float16 if self.forms[name].narrow else self.scales


class RoundedCheckpoint(ChangedCheckpoint, RoundedTensors):
    """The same of a checkpoint, which may hold some of them in few bits itself; see Checkpoint, too.

    Args:
        checkpoint: as it was.
        forms: see RoundedTensors, and
        found: there, and
        scales: there.
        kept: those, and how; see `headfold.export.exportables.kept`.
    """

    original: Checkpoint

    def __init__(
        self,
        checkpoint: Checkpoint,
        forms: Mapping[str, Form],
        found: Mapping[str, Rounded] | None = None,
        kept: Mapping[str, Form] | None = None,
        scales: torch.dtype = torch.float32,
    ) -> None:
        RoundedTensors.__init__(self, checkpoint, forms, found, scales)
        self.kept = kept or {}
        self.forms |= self.kept

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return torch.float32 if name in self.forms else self.original.dtype(name)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        return RoundedTensors.read(self, name)

    def made(self, name: str) -> Rounded:
        """See RoundedTensors.

        Raises:
            BundleError: the checkpoint does not hold it as `kept` says.
        """
        if name not in self.kept:
            return super().made(name)
        form = self.kept[name]
        rounding = kept(self.original, name, self.scales_of(name), self.scales)
        if rounding is None or replace(rounding.form, narrow=form.narrow) != form:
            raise BundleError(f"{name} is not in {self.path} as the bundle kept it", fix="Export it again.")
        return rounding


class StoredTensors:
    """Rounded weights as a graph stores them: see Tensors, and `stored_shapes` for their names."""

    def __init__(self, checkpoint: RoundedTensors) -> None:
        self._checkpoint, self.path, self._whole = checkpoint, checkpoint.path, dict[str, str]()
        self._shapes = dict(checkpoint.shapes())
        for name, form in checkpoint.forms.items():
            parts = stored_shapes(name, form, self._shapes.pop(name))
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
