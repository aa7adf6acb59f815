"""GPTQ as AutoGPTQ and GPTQModel store it: columns packed along the inputs, zero points along the outputs, per group.

The first version stores zero points less one, `gptq_v2` as they are. With act-order `g_idx` says whose group a column is.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ValidationInfo, field_validator

from headfold.export.checkpoints.quantized.parts import (
    FLOAT_KINDS,
    Dequantized,
    GroupSize,
    Parts,
    column_groups,
    groups_of,
    in_lower_case,
)
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor, unpacked

Layout = Annotated[Literal["gptq", "gptq_v2"] | None, BeforeValidator(in_lower_case)]


class GPTQ(BaseModel, frozen=True):
    """See Format; the fields are those of `quantization_config`."""

    bits: Literal[2, 4, 8]
    group_size: GroupSize = 128
    checkpoint_format: Layout = None  # the first version, if neither this says another nor
    format: Layout = None  # what newer tools call it
    desc_act: bool | None = False  # act-order
    pack_dtype: Literal["int32"] = "int32"
    is_marlin_format: Literal[False] | None = False
    dynamic: dict[str, dict[str, None]] | None = None  # modules with settings of their own; only left-out ones are read

    values: ClassVar[tuple[str, ...]] = (".qweight",)
    scales: ClassVar[tuple[str, ...]] = (".scales",)
    others: ClassVar[tuple[str, ...]] = (".qzeros", ".g_idx")
    target: ClassVar[str] = ".weight"

    @field_validator("format")
    @classmethod
    def _one_layout(cls, value: str | None, others: ValidationInfo) -> str | None:
        older = others.data.get("checkpoint_format")
        if value is not None and older is not None and value != older:
            raise ValueError(f"checkpoint_format is {older!r}")
        return value

    @property
    def title(self) -> str:
        """See Format."""
        groups = "a scale per row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"GPTQ {self.bits} bits, {groups}"

    def source(self, parts: Parts) -> Dequantized:
        """See Format."""
        packed = 32 // self.bits
        words, scales = parts[".qweight"], parts[".scales"]
        rows, columns = (words.shape[1], words.shape[0] * packed) if len(words.shape) == 2 else (1, packed)
        count = groups_of(columns, self.group_size)
        words.of((max(columns, packed) // packed, max(rows, 1)), "I32")
        scales.of((count, rows), *FLOAT_KINDS)
        zeros = parts[".qzeros"].of((count, -(-rows // packed)), "I32")
        # Without it nobody knows whose group a column in act-order is
        ordered = bool(self.desc_act) and self.group_size != -1
        index = parts[".g_idx"].of((columns,), "I32") if ".g_idx" in parts or ordered else None

        def make() -> QuantizedTensor:
            points = unpacked(zeros.read(), self.bits)[:, :rows]
            if "gptq_v2" not in {self.checkpoint_format, self.format}:
                points = (points + 1) & (2**self.bits - 1)  # a zero point of 0 was stored as the largest number
            return QuantizedTensor(
                values=unpacked(words.read().T, self.bits),
                scales=scales.read().T,
                zeros=points.T,
                block=(1, columns if self.group_size == -1 else self.group_size),
                bits=self.bits,
                groups=column_groups(index, columns, count, self.group_size) if index is not None else None,
            )

        return Dequantized((rows, columns), make)
