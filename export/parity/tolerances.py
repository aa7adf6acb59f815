"""How far a graph may be from its oracle, by how it computes, and why."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.dtypes import DType, Quantized
from headfold.plugins.names import is_cache_output

Engine = Literal["onnxruntime", "tensorrt"]


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute error allowed: `absolute`, or `relative` times the oracle's largest magnitude in the tensor if more.

    Logits and everything else differ: logits are what users see; residual streams have a few elements in the thousands (Sun et al.
    2024, Massive Activations, section 2), and an error is small or large in relation to those.
    """

    logits: tuple[float, float]
    other: tuple[float, float]  # caches and residual stream
    cache: tuple[float, float] | None = None  # of a quantized cache, in what it stores

    def limit(self, name: str, expected: NDArray[np.float32]) -> float:
        """The largest error allowed in this output."""
        absolute, relative = self.logits if name == "logits" else self.other
        if self.cache is not None and is_cache_output(name):
            absolute, relative = self.cache
        return max(absolute, relative * float(np.abs(expected).max(initial=0, where=np.isfinite(expected))))


# float32: eps is 1.2e-7; sums of about a thousand products in another order, through some tens of layers, lose about two digits.
# SmolLM2's logits reach 29, and are off by up to 7e-5 from float64 in ONNX Runtime as in PyTorch.
_FLOAT32 = Tolerance(logits=(1e-4, 5e-6), other=(1e-4, 1e-5))
# float16: eps is 9.8e-4; every intermediate result is rounded in the graph, but not in the float32 oracle that has the same
# weights; roundings add up like a random walk, about 8 eps after 30 layers. bfloat16 has three bits less: eight times as much.
_FLOAT16 = Tolerance(logits=(1e-2, 2e-2), other=(1e-2, 2e-2))
_BFLOAT16 = Tolerance(logits=(8e-2, 1.6e-1), other=(8e-2, 1.6e-1))
_ARITHMETIC: dict[DType, Tolerance] = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16}
_ROUNDED = (5e-2, 5e-2)
# float32 may be off by so many times the error that PyTorch's has: another order of sums, and the largest of many. A product of
# rounded weights is summed of unsigned numbers, their zero point apart: MatMulNBits of four bits loses 1.7 eps of sum |x| |w|, a
# float32 product 0.4 (ONNX Runtime 1.31, 576 inputs)
_MARGIN, _ROUNDED_MARGIN = 8, 32
_STEPS: dict[Quantized, float] = {"int8": 1.0, "float8_e4m3fn": 32.0}
_CACHES: dict[Quantized, float] = {
    "int8": 8.0,
    "float8_e4m3fn": 96.0,
}  # in what the cache stores: 8 steps, 3 of the largest


@dataclass(frozen=True)
class Precision:
    """How a graph computes: where, in which dtype, what its cache stores (None: the same), and whether its weights are rounded."""

    engine: Engine
    dtype: DType
    cache: Quantized | None = None
    rounded: bool = False

    @property
    def margin(self) -> int:
        """How many times PyTorch's own error is allowed where that is more than the tolerance."""
        return _ROUNDED_MARGIN if self.rounded else _MARGIN

    @property
    def narrow(self) -> bool:
        """Whether a near-tie of two tokens may fall the other way."""
        return self.cache is not None or self.dtype != "float32"

    @property
    def tolerance(self) -> Tolerance:
        """What is tolerated.

        Where arithmetic differs a little, a value halfway between two numbers of a quantized cache is rounded to either; by it the
        next layers get other inputs and round more values differently, so that the logits end up as far apart as quantization
        itself moves them: by a few percent of the largest. What is exact about a quantized cache is tested where it can be, on the
        op alone.
        """
        if self.cache is not None:
            return Tolerance(_ROUNDED, _ROUNDED, (_CACHES[self.cache], 0.0))
        return _ARITHMETIC[self.dtype]

    @property
    def layer_tolerance(self) -> tuple[float, float]:
        """Of a layer alone: what it adds to the residual stream, over the largest number it adds; what it stores in its cache.

        The latter over the largest number it stores; of a quantized cache in steps: a value halfway between two is rounded to either.
        """
        if self.cache is not None:
            return 5e-2, _STEPS[self.cache]
        return 1e-5, 1e-5  # about 80 eps: dot products of some thousand terms, and a softmax

    @property
    def arithmetic(self) -> str:
        """How both sides compute, in words."""
        if self.engine == "tensorrt":
            words = f"TensorRT network in {self.dtype}, on the CPU, against float32 PyTorch with the same {self.dtype} weights"
        elif self.dtype == "float32":
            words = "float32 on both sides"
        else:
            words = f"float32 on both sides, with the bundle's {self.dtype} weights"
            words += ", and float16 against it" if self.dtype == "float16" else ": ONNX Runtime has no bfloat16 on CPUs"
        return words + (f", {self.cache} cache on both sides" if self.cache is not None else "")

    def __str__(self) -> str:
        return " ".join(filter(None, (self.engine, self.dtype, self.cache)))
