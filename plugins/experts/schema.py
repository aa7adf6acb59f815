"""The operator headfold::MixtureOfExperts: its names, in order, and their meaning.

Every body and kernel obeys this file. Shapes: N tokens, H hidden size, E experts, I intermediate size of one expert.
Each token goes to the k experts with the largest router logits (of equal ones the first), and their answers are added, each times its
share of the softmax over these k logits (Shazeer et al. 2017, equations 1 to 5, without noise). An expert is a gated feed-forward
(Shazeer 2020): down(activation(gate(x)) * up(x)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Literal, TypeVar

from headfold.plugins.attention.schema import DOMAIN as DOMAIN  # both ops are of one domain

OP_TYPE = "MixtureOfExperts"
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


INPUTS = tuple(field.name for field in fields(ExpertsInputs))


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
