"""What a format of quantized checkpoints is, and the tensors that are made of several stored ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import AfterValidator, Field

from headfold.export.checkpoints.directories.stored import AGAIN, Source, Stored
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.runtime.errors import CheckpointError

FLOAT_KINDS = ("F16", "BF16", "F32")  # of scales


def _group_size(value: int) -> int:
    if value != -1 and not 0 < value < 1 << 31:
        raise ValueError("it must be -1, or between 1 and 2^31")
    return value


def in_lower_case(value: object) -> object:
    """A setting that tools write in either case."""
    return value.lower() if isinstance(value, str) else value


GroupSize = Annotated[int, AfterValidator(_group_size)]  # in columns; -1: one group
BlockSize = Annotated[int, Field(gt=0, lt=1 << 31)]  # in rows or columns


@dataclass(frozen=True)
class Parts:
    """The stored tensors that one tensor is made of, by what their names end in."""

    name: str  # of the tensor
    stored: Mapping[str, Stored]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.stored

    def __getitem__(self, suffix: str) -> Stored:
        """One of them.

        Raises:
            CheckpointError: it is not there.
        """
        if suffix not in self.stored:
            there = next(iter(self.stored.values()))
            raise CheckpointError(f"tensor {self.name} has no {suffix.lstrip('._')}", where=there.file, fix=AGAIN)
        return self.stored[suffix]


class Format(Protocol):
    """How checkpoints of one `quant_method` store weights. Names of stored tensors end in one of the suffixes."""

    @property
    def title(self) -> str:
        """What a person calls it: "GPTQ 4 bits, groups of 128"."""
        ...

    @property
    def values(self) -> tuple[str, ...]:
        """Of the quantized values: the first one that is there says that the tensor is quantized."""
        ...

    @property
    def scales(self) -> tuple[str, ...]:
        """Of the scales, one of which every quantized tensor has."""
        ...

    @property
    def others(self) -> tuple[str, ...]:
        """Of what else a tensor may have."""
        ...

    @property
    def target(self) -> str:
        """Of the tensor that they make."""
        ...

    def source(self, parts: Parts) -> Source:
        """The tensor, its parts of the right dtypes and of shapes that fit together; nothing large is read.

        Raises:
            CheckpointError: they are not.
        """
        ...


@dataclass(frozen=True)
class Dequantized:
    """A Source whose parts `make` reads."""

    shape: tuple[int, ...]
    make: Callable[[], QuantizedTensor]
    dtype: torch.dtype = torch.float32

    def read(self) -> torch.Tensor:
        """See Source."""
        return self.make().dequantize()

    def quantized(self) -> QuantizedTensor:
        """See Source."""
        return self.make()


def groups_of(columns: int, size: int) -> int:
    """How many groups of a size there are among so many columns; a size of -1 means one for all."""
    return 1 if size == -1 else -(-columns // size)


def column_groups(stored: Stored, columns: int, count: int, size: int) -> torch.Tensor | None:
    """The group of each column, [K]; None where groups of this size follow one another.

    Raises:
        CheckpointError: it names a group that is not there.
    """
    groups = stored.read().long()
    if columns and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise CheckpointError(
            f"tensor {stored.name} names groups {int(groups.min())} to {int(groups.max())}, of {count}",
            where=stored.file,
            fix=AGAIN,
        )
    in_order = torch.arange(columns) // (columns if size == -1 else size)
    return None if torch.equal(groups, in_order) else groups
