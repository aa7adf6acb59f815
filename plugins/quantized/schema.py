"""The operators headfold::QuantizedMatMul, QuantizedGather, RoundedMatMul and Float8MatMul: a matrix of few bits multiplies, or is
looked up in.

Every body and kernel obeys this file. A matrix W [N, K] is G blocks of K / G = `block` numbers along K, each with a scale:
W[n, k] = (q[n, k] - z[n, k // block]) * scales[n, k // block], q from 0 to 2^bits - 1. Both operators read it in one form, so that
an embedding and the head tied to it are one matrix in the file:

    values  uint8 [N, G, block * bits / 8]: q; of two numbers of four bits the first is the lower half of the byte
    scales  T [N, G]
    zeros   uint8 [N, G * bits / 8], rounded up: z, packed alike; 2^(bits - 1) where there are none. QuantizedMatMul alone has them.

RoundedMatMul rounds its input, too, so that sums are of integers, exact. Each row of x by itself, whatever else is in the batch:

    m = max |x[row]|, at least SMALLEST;  u = rint(x[row] / m * 127) + 128, from 1 to 255
    product[row, n] = sum_k (u[k] - 128) * values[k, n] * scales[n] * m / 127

    values  int8 [K, N], from -63 to 63: on CPUs with AVX2 and no VNNI two products of u (eight bits) and a value are added in 16
            bits, saturating; 2 * 255 * 64 fits
    scales  T [N]

Float8MatMul takes x as it is: product = x @ (values * scales[:, None]).T

    values  float8_e4m3fn [N, K]
    scales  T [N]
"""

from dataclasses import dataclass, fields
from typing import Final, Generic, Literal, TypeVar

from headfold.plugins.attention.schema import DOMAIN as DOMAIN  # all ops are of one domain, in one version
from headfold.plugins.attention.schema import VERSION as VERSION

BLOCK: Final = 32  # of what headfold rounds itself, unless it is told otherwise
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128  # powers of two between
FLOAT4_BLOCK: Final = 16  # NVFP4's
SMALLEST = 1e-30  # a row of zeros has no scale of its own
Bits = Literal[4, 8]  # of a number in a matrix of blocks
# How exactly a product computes: 1 with its input as it is, 4 with its input rounded to eight bits per block (faster on CPUs); the
# numbers are ONNX Runtime's.
Level = Literal[1, 4]

MATMUL = "QuantizedMatMul"
MATMUL_OUTPUT = "product"  # T [..., N]: x @ W.T
ROUNDED = "RoundedMatMul"
FLOAT8 = "Float8MatMul"
GATHER = "QuantizedGather"
GATHER_OUTPUT = "rows"  # T [B, S, K]: W[indices]
V = TypeVar("V")  # an array, a value of a graph


@dataclass(frozen=True, kw_only=True)
class MatMulInputs(Generic[V]):
    """The inputs of QuantizedMatMul, in the order of an ONNX node's."""

    x: V  # T [..., K]
    values: V
    scales: V
    zeros: V | None = None


@dataclass(frozen=True, kw_only=True)
class GatherInputs(Generic[V]):
    """The inputs of QuantizedGather, in the order of an ONNX node's."""

    values: V
    scales: V
    indices: V  # int64 [B, S]


@dataclass(frozen=True, kw_only=True)
class RoundedInputs(Generic[V]):
    """The inputs of RoundedMatMul and Float8MatMul, in the order of an ONNX node's."""

    x: V  # T [..., K]
    values: V
    scales: V


MATMUL_INPUTS = tuple(field.name for field in fields(MatMulInputs))
GATHER_INPUTS = tuple(field.name for field in fields(GatherInputs))
ROUNDED_INPUTS = tuple(field.name for field in fields(RoundedInputs))


@dataclass(frozen=True, kw_only=True)
class MatMulAttributes:
    """The attributes of QuantizedMatMul."""

    K: int
    N: int
    bits: Bits
    block_size: int = BLOCK
    accuracy_level: Level = 4


@dataclass(frozen=True, kw_only=True)
class GatherAttributes:
    """The attribute of QuantizedGather."""

    bits: Bits


@dataclass(frozen=True, kw_only=True)
class RoundedAttributes:
    """RoundedMatMul and Float8MatMul have none."""
