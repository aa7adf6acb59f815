"""compressed-tensors, as llm-compressor writes them: int4 and int8 packed into words, int8 and float8 as they are.

Which scheme a tensor has is told by its own shapes, not by the patterns of module names in the configuration; where two
schemes fit, it is refused. How activations are to be quantized is left aside.
"""

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, field_validator

from headfold.export.checkpoints.directories.stored import OTHERS
from headfold.export.checkpoints.quantized.parts import (
    FLOAT_KINDS,
    BlockSize,
    Dequantized,
    GroupSize,
    Parts,
    column_groups,
    in_lower_case,
)
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor, unpacked
from headfold.runtime.errors import CheckpointError

_PLAIN = {"I8": "int", "F8_E4M3": "float"}


class Weights(BaseModel, frozen=True):
    """How a scheme stores weights."""

    num_bits: Literal[4, 8] = 8
    type: Annotated[Literal["int", "float"], BeforeValidator(in_lower_case)] = "int"
    symmetric: bool = True
    strategy: Annotated[Literal["tensor", "channel", "group", "block"] | None, BeforeValidator(in_lower_case)] = None
    group_size: GroupSize | None = None
    block_structure: tuple[BlockSize, BlockSize] | None = None
    actorder: Annotated[str | bool | None, BeforeValidator(in_lower_case)] = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _in_one_text(cls, value: object) -> object:
        return value.split("x") if isinstance(value, str) else value  # "128x128", as older versions have it

    @property
    def by_tensor(self) -> bool:
        """Whether there is one scale, where nothing else says how many."""
        return self.strategy == "tensor" or (self.strategy is None and self.group_size is None)

    @property
    def ordered(self) -> bool:
        """Whether columns of a group do not lie together, and an index says whose group a column is."""
        return self.actorder in {"group", "dynamic", True}

    @property
    def title(self) -> str:
        """ "int4, groups of 128"."""
        if self.block_structure:
            how = "blocks of {} x {}".format(*self.block_structure)
        elif self.group_size and self.group_size > 0:
            how = f"groups of {self.group_size}"
        else:
            how = "a scale per tensor" if self.by_tensor else "a scale per row"
        return f"{self.type}{self.num_bits}, {how}"

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Of a scale."""
        if self.block_structure:
            return self.block_structure
        if self.group_size and self.group_size > 0:
            return 1, self.group_size
        return (rows if self.by_tensor else 1), columns


class Scheme(BaseModel, frozen=True):
    """One of `config_groups`."""

    weights: Weights | None = None


class CompressedTensors(BaseModel, frozen=True):
    """See Format; the fields are those of `quantization_config`."""

    format: Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"]
    config_groups: dict[str, Scheme]
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None

    values: ClassVar[tuple[str, ...]] = ("_packed", "")
    scales: ClassVar[tuple[str, ...]] = ("_scale",)
    others: ClassVar[tuple[str, ...]] = ("_zero_point", "_shape", "_g_idx")
    target: ClassVar[str] = ""

    @field_validator("sparsity_config")
    @classmethod
    def _dense(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("format") != "dense":
            raise ValueError(f"{value.get('format')!r} is not read")
        return value

    @field_validator("transform_config")
    @classmethod
    def _untransformed(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("config_groups"):
            raise ValueError("rotations at run time are not read")
        return value

    @property
    def title(self) -> str:
        """See Format."""
        return f"compressed-tensors {'; '.join(dict.fromkeys(weights.title for weights in self._weights))}"

    @property
    def _weights(self) -> list[Weights]:
        return [scheme.weights for scheme in self.config_groups.values() if scheme.weights is not None]

    def source(self, parts: Parts) -> Dequantized:
        """See Format."""
        packed = "_packed" in parts
        values = parts["_packed" if packed else ""]
        if packed:
            shape = parts["_shape"].of((len(values.shape),), "I64", "I32").read().tolist()
            values.of(values.shape, "I32")
        else:
            shape = list(values.shape)
            values.of(values.shape, *_PLAIN)
        if len(shape) < 2 or min(shape) < 1:
            raise self._unfit(parts)
        *experts, rows, columns = shape
        fitting = {}  # by block and bits: equal schemes may stand for different modules
        symmetric = unordered = False  # whether one of them is
        for weights in self._weights:
            block = weights.block(rows, columns)
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            if packed:
                width = -(-columns * weights.num_bits // 32)
                wide = values.shape == (*experts, rows, width) and weights.type == "int"
            else:
                wide = _PLAIN[values.kind] == weights.type and (weights.type == "int" or weights.num_bits == 8)
            scales = parts["_scale"].shape
            flat: set[tuple[int, ...]] = set()  # how else a column of scales may lie there
            if grid[1] == 1 and not experts:
                flat = {(), (1,)} if grid[0] == 1 else {(rows,)}
            if wide and scales in flat | {(*experts, *grid)}:
                fitting[block, weights.num_bits] = grid
                symmetric |= weights.symmetric
                unordered |= not weights.ordered
        if len(fitting) != 1:
            raise self._unfit(parts)
        ((block, bits), grid), *_ = fitting.items()
        parts["_scale"].of(parts["_scale"].shape, *FLOAT_KINDS)
        if "_zero_point" in parts or not symmetric:
            if packed and not _one_point(parts):
                parts["_zero_point"].of((*experts, -(-grid[0] * bits // 32), grid[1]), "I32")
            else:
                parts["_zero_point"].of(parts["_scale"].shape, "I8" if packed else values.kind)
        if "_g_idx" in parts or not unordered:
            parts["_g_idx"].of((columns,), "I32", "I64")
        make = partial(_read, parts, tuple(shape), block, bits, (*experts, *grid))
        return Dequantized(tuple(shape), make)

    def _unfit(self, parts: Parts) -> CheckpointError:
        return CheckpointError(
            f"tensor {parts.name} and its scales {list(parts['_scale'].shape)} fit not one scheme of config_groups",
            where=parts["_scale"].file,
            fix=OTHERS,
        )


def _read(
    parts: Parts, shape: tuple[int, ...], block: tuple[int, int], bits: int, grid: tuple[int, ...]
) -> QuantizedTensor:
    packed, zeros = "_packed" in parts, None
    values = _signed(parts["_packed"].read(), bits)[..., : shape[-1]] if packed else parts[""].read()
    if values.dtype == torch.int8 and bits < 8 and bool(((values << (8 - bits) >> (8 - bits)) != values).any()):
        raise CheckpointError(
            f"tensor {parts.name} has numbers of more than {bits} bits", where=parts["_scale"].file, fix=OTHERS
        )
    if "_zero_point" in parts:
        zeros = parts["_zero_point"].read()
        whole = not packed or _one_point(parts)
        zeros = zeros.reshape(grid) if whole else _signed(zeros.mT, bits)[..., : grid[-2]].mT  # packed along the rows
    groups = None
    if "_g_idx" in parts and not bool((parts["_g_idx"].read() == -1).all()):  # which stands for columns in order
        groups = column_groups(parts["_g_idx"], shape[-1], grid[-1], block[1])
    return QuantizedTensor(values, parts["_scale"].read().reshape(grid), zeros, block, bits, groups)


def _one_point(parts: Parts) -> bool:
    """Whether a packed tensor has one zero point, which is then not packed."""
    return "_zero_point" in parts and parts["_zero_point"].kind == "I8"


def _signed(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What was packed is the number above the smallest one."""
    return unpacked(words, bits).sub(2 ** (bits - 1)).view(torch.int8)
