"""MXFP4, as gpt_oss stores its experts: 4-bit floats, two in a byte, and an exponent for each 32 of them (OCP Microscaling 1.0)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel

from headfold.export.checkpoints.directories.stored import Stored
from headfold.export.checkpoints.quantized.parts import Parts

_BLOCK = 32  # numbers
_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat((_NUMBERS, -_NUMBERS))  # by the four bits, e2m1
_E8M0 = torch.from_numpy(np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)))  # by the byte


class MXFP4(BaseModel, frozen=True):
    """See Format."""

    values: ClassVar[tuple[str, ...]] = ("_blocks",)
    scales: ClassVar[tuple[str, ...]] = ("_scales",)
    others: ClassVar[tuple[str, ...]] = ()
    target: ClassVar[str] = ""
    title: ClassVar[str] = "mxfp4, blocks of 32"

    def source(self, parts: Parts) -> "MicroscaledExperts":
        """See Format."""
        blocks, scales = parts["_blocks"], parts["_scales"]
        experts, rows, count = blocks.shape[:3] if len(blocks.shape) == 4 else (0, 0, 0)
        blocks.of((experts, rows, count, _BLOCK // 2), "U8")
        scales.of((experts, rows, count), "U8")
        return MicroscaledExperts((experts, count * _BLOCK, rows), blocks, scales)


@dataclass(frozen=True)
class MicroscaledExperts:
    """A Source [E, K, N] of blocks [E, N, K / 32, 16] and scales [E, N, K / 32]: transformers has these weights transposed."""

    shape: tuple[int, ...]
    blocks: Stored
    scales: Stored
    dtype: torch.dtype = torch.bfloat16  # which holds them all exactly

    def read(self) -> torch.Tensor:
        """See Source; one expert at a time is wider than it needs to be."""
        blocks, scales = self.blocks.read(), self.scales.read()
        result = torch.empty(self.shape, dtype=self.dtype)
        for expert, (octets, exponents) in enumerate(zip(blocks, scales, strict=True)):
            halves = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)  # [N, K / 32, 32]
            numbers = _FP4[halves.int()] * _E8M0[exponents.int()][..., None]
            result[expert] = numbers.flatten(1).T
        return result

    def quantized(self) -> None:
        """See Source: an exponent and 4-bit floats are no QuantizedTensor."""
        return None
