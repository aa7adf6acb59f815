"""8-bit floats with a scale per block (DeepSeek's and Qwen's `weight_scale_inv`, which multiplies) or per tensor.

How activations are to be quantized is left aside: what is exported computes with the weights as they are.
"""

from typing import ClassVar, Literal

from pydantic import BaseModel

from headfold.export.checkpoints.quantized.parts import FLOAT_KINDS, BlockSize, Dequantized, Parts
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor


class FP8(BaseModel, frozen=True):
    """See Format; the fields are those of `quantization_config`."""

    weight_block_size: tuple[BlockSize, BlockSize] | None = None
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    expert_dtype: Literal["fp8"] = "fp8"

    values: ClassVar[tuple[str, ...]] = ("",)
    scales: ClassVar[tuple[str, ...]] = ("_scale_inv", "_scale")
    others: ClassVar[tuple[str, ...]] = ()
    target: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """See Format."""
        block = self.weight_block_size
        return f"float8, {f'blocks of {block[0]} x {block[1]}' if block else 'a scale per tensor'}"

    def source(self, parts: Parts) -> Dequantized:
        """See Format."""
        values = parts[""]
        values.of(tuple(max(size, 1) for size in values.shape), "F8_E4M3")  # nothing has no scale
        scales = parts["_scale_inv" if "_scale_inv" in parts else "_scale"]
        rows, columns = values.shape[-2:] if len(values.shape) > 1 else (1, 1)
        block = self.weight_block_size or (rows, columns)
        if scales.shape in {(), (1,)} or len(values.shape) < 2:
            block = (rows, columns)
            scales.of(scales.shape if scales.shape == () else (1,), *FLOAT_KINDS)
        else:
            blocks = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
            scales.of(blocks, *FLOAT_KINDS, "F8_E8M0")

        def make() -> QuantizedTensor:
            scale = scales.read()
            return QuantizedTensor(
                values=values.read(),
                scales=scale.reshape(1, 1) if scale.ndim < 2 else scale,
                zeros=None,
                block=block,
                bits=8,
            )

        return Dequantized(values.shape, make)
