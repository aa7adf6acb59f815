"""The operators headfold::MixtureOfExperts and QuantizedMixtureOfExperts: their names, in order, and their meaning.

Every body and kernel obeys this file. Shapes: N tokens, H hidden size, E experts, I intermediate size of one expert.
Each token goes to the k experts with the largest router logits (of equal ones the first), and their answers are added, each times its
share of the softmax over these k logits (Shazeer et al. 2017, equations 1 to 5, without noise). An expert is a gated feed-forward
(Shazeer 2020): down(activation(gate(x)) * up(x)).

QuantizedMixtureOfExperts has its experts' matrices in few bits, each as `headfold.plugins.quantized.schema` has one: in blocks of
BLOCK, whose bytes are end to end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Literal, TypeVar

from headfold.plugins.attention.schema import DOMAIN as DOMAIN  # all ops are of one domain
from headfold.plugins.quantized.schema import Bits, Level

OP_TYPE = "MixtureOfExperts"
QUANTIZED = "QuantizedMixtureOfExperts"
OUTPUT = "output"  # [N, H]

Activation = Literal["silu", "gelu", "gelu_tanh"]
T = TypeVar("T")  # an array, a tensor, a value of a graph


@dataclass(frozen=True, kw_only=True)
class ExpertsInputs(Generic[T]):
    """The operator's inputs, in the order of an ONNX node's; one that is None is left empty there."""

    hidden_states: T  # [N, H]
    router_logits: T  # [N, E]
    gate_up_weight: T  # [E, 2I, H]; which rows are the gate's: see `interleaved`
    down_weight: T  # [E, H, I]
    gate_up_bias: T | None = None  # [E, 2I], rows as those of the weight
    down_bias: T | None = None  # [E, H]

    @classmethod
    def of_node(cls, values: Sequence[T | None]) -> "ExpertsInputs[T]":
        """Take a node's inputs apart."""
        return cls(**dict(zip(INPUTS, values, strict=False)))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class QuantizedExpertsInputs(ExpertsInputs[T]):
    """The inputs of QuantizedMixtureOfExperts: the other's first, of which weights are uint8 [E, N, K * bits / 8]."""

    gate_up_scales: T  # [E, 2I, G], rows as those of the weight
    down_scales: T  # [E, H, G]


INPUTS = tuple(field.name for field in fields(ExpertsInputs))
QUANTIZED_INPUTS = tuple(field.name for field in fields(QuantizedExpertsInputs))


@dataclass(frozen=True)
class ExpertsAttributes:
    """The operator's attributes. An expert computes act(min(gate, limit)) * (clamp(up, -limit, limit) + beta).

    `act` of "silu" is x * sigmoid(alpha * x); "gelu" is the exact one, "gelu_tanh" its approximation, neither with alpha.
    gpt-oss has alpha 1.702, beta 1 and limit 7.
    """

    k: int
    activation: Activation = "silu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    interleaved: int = (
        0  # 0: the gate's I rows, then up's (Hugging Face); 1: gate and up alternate (gpt-oss, ONNX Runtime)
    )


@dataclass(frozen=True)
class QuantizedExpertsAttributes(ExpertsAttributes):
    """The attributes of QuantizedMixtureOfExperts: those, and how its matrices are stored and multiplied."""

    bits: Bits = 8
    accuracy_level: Level = 4
