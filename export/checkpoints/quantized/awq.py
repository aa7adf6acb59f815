"""AWQ as AutoAWQ's "gemm" version stores it: 4 bits, eight outputs in a word in an order of their own, per group of inputs."""

from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from torch import Tensor

from headfold.export.checkpoints.quantized.parts import (
    FLOAT_KINDS,
    Dequantized,
    GroupSize,
    Parts,
    groups_of,
    in_lower_case,
)
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor, unpacked

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # the place in a word, from the lowest bits, of each of its eight outputs

Version = Annotated[Literal["gemm"], BeforeValidator(in_lower_case)]


class AWQ(BaseModel, frozen=True):
    """See Format; the fields are those of `quantization_config`."""

    bits: Literal[4] = Field(4, validation_alias=AliasChoices("bits", "w_bit"))  # the second ones are older tools'
    group_size: GroupSize = Field(128, validation_alias=AliasChoices("group_size", "q_group_size"))
    version: Version = "gemm"
    format: Version = "gemm"  # what newer tools call it
    zero_point: Literal[True] = True

    values: ClassVar[tuple[str, ...]] = (".qweight",)
    scales: ClassVar[tuple[str, ...]] = (".scales",)
    others: ClassVar[tuple[str, ...]] = (".qzeros",)
    target: ClassVar[str] = ".weight"

    @property
    def title(self) -> str:
        """See Format."""
        groups = "a scale per row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"AWQ {self.bits} bits, {groups}"

    def source(self, parts: Parts) -> Dequantized:
        """See Format."""
        words, scales = parts[".qweight"], parts[".scales"]
        columns, rows = (words.shape[0], words.shape[1] * 8) if len(words.shape) == 2 else (1, 8)
        count = groups_of(columns, self.group_size)
        words.of((max(columns, 1), max(rows, 8) // 8), "I32")
        scales.of((count, rows), *FLOAT_KINDS)
        zeros = parts[".qzeros"].of((count, rows // 8), "I32")

        def make() -> QuantizedTensor:
            return QuantizedTensor(
                values=_in_order(words.read()).T,
                scales=scales.read().T,
                zeros=_in_order(zeros.read()).T,
                block=(1, columns if self.group_size == -1 else self.group_size),
                bits=self.bits,
            )

        return Dequantized((rows, columns), make)


def _in_order(words: Tensor) -> Tensor:
    rows, count = words.shape
    return unpacked(words, 4).reshape(rows, count, 8)[..., _PLACES].flatten(-2)
