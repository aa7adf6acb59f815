"""transformers' mixtures of experts become our op: a function registered by name, for every model that asks `ExpertsInterface`.

What a model's gate computes is tried on numbers, not read off its class: a gate that the op has not is refused by name.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from headfold.plugins.experts.schema import ExpertsAttributes, ExpertsInputs
from headfold.plugins.experts.torch_op import gated, mixture_of_experts, routed
from headfold.runtime.errors import ConfigError

NAME = "headfold"  # of the experts, in `config._experts_implementation`
_OWN = "headfold_attributes"  # of a module of experts: what `learn_gates` found
_FIX = "headfold's MixtureOfExperts has gated experts with SiLU or GELU."


def learn_gates(model: nn.Module) -> None:
    """Find the op's attributes for every module of experts in a model; they are kept with it.

    Raises:
        ConfigError: experts that the op cannot be.
    """
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):
            object.__setattr__(module, _OWN, _attributes(name, module))


def _attributes(name: str, module: Any) -> ExpertsAttributes:
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):  # older transformers have no such experts
        what = "a norm after its experts" if module.has_gate else "experts without a gate"
        raise ConfigError(f"has {what}", where=name, fix=_FIX)
    line = torch.linspace(-12, 12, 49, dtype=torch.float64, device="cpu")
    gate, up = torch.cartesian_prod(line, line).T  # every pair of them
    gate_up = torch.cat((gate, up)) if module.is_concatenated else torch.stack((gate, up), 1).flatten()
    actual = module._apply_gate(gate_up[None])[0]
    for attributes in _candidates(module):
        if torch.allclose(gated(gate_up[None], attributes)[0], actual, rtol=1e-6, atol=1e-6):
            return attributes
    raise ConfigError(f"{type(module).__name__} has a gate of its own", where=name, fix=_FIX)


def _candidates(module: Any) -> Iterator[ExpertsAttributes]:
    alpha, limit = float(getattr(module, "alpha", None) or 1), float(getattr(module, "limit", None) or math.inf)
    interleaved = int(not module.is_concatenated)
    for beta in (0.0, 1.0):
        yield ExpertsAttributes(1, "silu", alpha, beta, limit, interleaved)
        yield ExpertsAttributes(1, "gelu", 1.0, beta, limit, interleaved)
        yield ExpertsAttributes(1, "gelu_tanh", 1.0, beta, limit, interleaved)


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See transformers' ExpertsInterface: hidden states [N, H], chosen experts [N, k] and their weights."""
    if hidden_states.is_meta and not torch.compiler.is_exporting():  # only facts are learned
        return torch.empty_like(hidden_states)
    m = cast(Any, module)
    up, down = m.gate_up_proj, m.down_proj  # [E, 2I, H], [E, H, I]
    if m.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    weights = top_k_weights.to(hidden_states.dtype)
    logits, total = routed(top_k_index, weights, up.shape[0])
    inputs = ExpertsInputs(
        hidden_states=hidden_states,
        router_logits=logits,
        gate_up_weight=up,
        down_weight=down,
        gate_up_bias=m.gate_up_proj_bias if m.has_bias else None,
        down_bias=m.down_proj_bias if m.has_bias else None,
    )
    return mixture_of_experts(inputs, replace(getattr(module, _OWN), k=top_k_index.shape[1])) * total


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
