"""headfold::MixtureOfExperts in torch: differentiable eager maths, and the registered op that an export traces.

Shapes are those of `headfold.plugins.experts.schema`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.plugins.experts.schema import INPUTS, Activation, ExpertsAttributes, ExpertsInputs


def mixture_of_experts(inputs: ExpertsInputs[Tensor], attributes: ExpertsAttributes) -> Tensor:
    """Route and answer, [N, H] in the dtype of `hidden_states`; in an export, a new value of the registered op.

    Only chosen experts compute, each for its tokens together.
    """
    if torch.compiler.is_exporting():
        tensors = {name: getattr(inputs, name) for name in INPUTS}
        return cast(Tensor, mixture_of_experts_op(**tensors, **vars(attributes)))
    return answer(inputs, attributes)


def routed(chosen: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """What the op needs of a routing it does not know: `router_logits` [N, E], and by what its output is to be multiplied, [N, 1].

    Any routing can be told so: the softmax of log(weight) over the chosen experts is weight / sum of weights.

    Args:
        chosen: int64 [N, k], no expert twice for one token.
        weights: [N, k], not negative; in any dtype, which the results have.
        num_experts: E.
    """
    kind = torch.finfo(weights.dtype)
    others = torch.full((weights.shape[0], num_experts), kind.min / 2, dtype=weights.dtype, device=weights.device)
    return others.scatter(1, chosen, weights.clamp_min(kind.tiny).log()), weights.sum(-1, keepdim=True)


def answer(inputs: ExpertsInputs[Tensor], attributes: ExpertsAttributes) -> Tensor:
    """The op itself, expert by expert."""
    x = inputs
    logits, chosen = x.router_logits.float().topk(attributes.k, -1)  # [N, k]
    weights = logits.softmax(-1).to(x.hidden_states.dtype)
    output = torch.zeros_like(x.hidden_states)
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        bias, down_bias = (b[expert] if b is not None else None for b in (x.gate_up_bias, x.down_bias))
        gate_up = F.linear(x.hidden_states[rows], x.gate_up_weight[expert], bias)  # [n, 2I]
        down = F.linear(gated(gate_up, attributes), x.down_weight[expert], down_bias)  # [n, H]
        output = output.index_add(0, rows, down * weights[rows, place, None])
    return output


def gated(gate_up: Tensor, attributes: ExpertsAttributes) -> Tensor:
    """[n, 2I] to [n, I]."""
    a = attributes
    gate, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if a.interleaved else gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    match a.activation:
        case "silu":
            gate = gate * torch.sigmoid(a.alpha * gate)
        case "gelu":
            gate = F.gelu(gate)
        case "gelu_tanh":
            gate = F.gelu(gate, approximate="tanh")
    return gate * (up + a.beta)


@torch.library.custom_op("headfold::MixtureOfExperts", mutates_args=())
def mixture_of_experts_op(
    hidden_states: Tensor,
    router_logits: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    k: int,
    activation: str,
    alpha: float,
    beta: float,
    limit: float,
    interleaved: int,
) -> Tensor:
    """`answer` as an op."""
    inputs = ExpertsInputs(
        hidden_states=hidden_states,
        router_logits=router_logits,
        gate_up_weight=gate_up_weight,
        down_weight=down_weight,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )
    return answer(inputs, ExpertsAttributes(k, cast(Activation, activation), alpha, beta, limit, interleaved))


@mixture_of_experts_op.register_fake
def _(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(hidden_states)
