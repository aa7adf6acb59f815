"""The operators headfold::QuantizedMatMul and headfold::QuantizedGather: a matrix of four or eight bits multiplies, or is looked up in.

Every body and kernel obeys this file. A matrix W [N, K] is blocks of `BLOCK` numbers along K, each with a scale:
W[n, k] = (q[n, k] - 2^(bits - 1)) * scales[n, k // BLOCK], q from 0 to 2^bits - 1. Both operators read it in one form, so that an
embedding and the head tied to it are one matrix in the file:

    values  uint8 [N, K / BLOCK, BLOCK * bits / 8]: q; of two numbers of four bits the first is the lower half of the byte
    scales  T [N, K / BLOCK]
"""

from dataclasses import dataclass
from typing import Literal

from headfold.plugins.attention.schema import DOMAIN as DOMAIN  # all ops are of one domain

BLOCK = 32
Bits = Literal[4, 8]
# How exactly a product computes: 1 with its input as it is, 4 with its input rounded to eight bits per block (faster on CPUs); the
# numbers are ONNX Runtime's.
Level = Literal[1, 4]

MATMUL = "QuantizedMatMul"
MATMUL_INPUTS = ("x", "values", "scales")  # T [..., K], see above
MATMUL_OUTPUT = "product"  # T [..., N]: x @ W.T

GATHER = "QuantizedGather"
GATHER_INPUTS = ("values", "scales", "indices")  # see above, int64 [B, S]
GATHER_OUTPUT = "rows"  # T [B, S, K]: W[indices]


@dataclass(frozen=True, kw_only=True)
class MatMulAttributes:
    """The attributes of QuantizedMatMul; QuantizedGather has `bits` alone."""

    K: int
    N: int
    bits: Bits
    block_size: int = BLOCK
    accuracy_level: Level = 4
