"""headfold::MixtureOfExperts, quantized or not, in plain numpy: the oracle of every body and kernel.

Clear, in float64, and slow on purpose.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.experts.schema import (
    INPUTS,
    ExpertsAttributes,
    ExpertsInputs,
    QuantizedExpertsAttributes,
    QuantizedExpertsInputs,
)
from headfold.plugins.quantized.reference import dequantized

Array = NDArray[Any]


def mixture_of_experts(inputs: ExpertsInputs[Array], attributes: ExpertsAttributes) -> Array:
    """One token and one expert at a time; shapes and sources are those of `headfold.plugins.experts.schema`.

    Computes in float64 and returns the dtype of `hidden_states`.
    """
    x = inputs
    output = np.zeros(x.hidden_states.shape)
    for n, token in enumerate(x.hidden_states.astype(np.float64)):
        logits = x.router_logits[n].astype(np.float64)
        chosen = np.argsort(-logits, kind="stable")[: attributes.k]
        weights = np.exp(logits[chosen] - logits[chosen].max())
        for e, weight in zip(chosen, weights / weights.sum(), strict=True):
            gate_up = x.gate_up_weight[e].astype(np.float64) @ token  # [2I]
            if x.gate_up_bias is not None:
                gate_up = gate_up + x.gate_up_bias[e]
            answer = x.down_weight[e].astype(np.float64) @ gated(gate_up, attributes)
            if x.down_bias is not None:
                answer = answer + x.down_bias[e]
            output[n] += weight * answer
    return output.astype(x.hidden_states.dtype)


def quantized_mixture_of_experts(
    inputs: QuantizedExpertsInputs[Array], attributes: QuantizedExpertsAttributes
) -> Array:
    """The same with the matrices that the numbers and scales stand for."""
    given, wide = {name: getattr(inputs, name) for name in INPUTS}, dict[str, Array]()
    for name in ("gate_up", "down"):
        values, scales = given[f"{name}_weight"], getattr(inputs, f"{name}_scales")
        pairs = zip(values, scales, strict=True)
        wide[f"{name}_weight"] = np.stack([dequantized(*pair, attributes.bits) for pair in pairs])
    return mixture_of_experts(ExpertsInputs(**given | wide), attributes)


def gated(gate_up: Array, attributes: ExpertsAttributes) -> Array:
    """[2I] to [I]."""
    a, half = attributes, len(gate_up) // 2
    gate, up = (gate_up[0::2], gate_up[1::2]) if a.interleaved else (gate_up[:half], gate_up[half:])
    gate, up = np.minimum(gate, a.limit), np.clip(up, -a.limit, a.limit)
    match a.activation:
        case "silu":
            gate = gate / (1 + np.exp(-a.alpha * gate))
        case "gelu":  # Hendrycks and Gimpel 2016
            gate = gate * np.array([(1 + math.erf(g / math.sqrt(2))) / 2 for g in gate])
        case "gelu_tanh":
            gate = gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
    result: Array = gate * (up + a.beta)
    return result
