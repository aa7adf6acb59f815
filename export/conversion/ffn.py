"""A plain feed-forward becomes a gated one that computes the same, so that training can put the gate to use.

`act(x W) W2` turns into `(act(x W) * (x V + c)) W2` with V = 0 and c = 1: the gate starts at one (Shazeer 2020, equations 5 and 6).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headfold.export.checkpoints.families import OWN
from headfold.export.model.config import FEED_FORWARDS, ModelConfig
from headfold.runtime.errors import ConfigError

GATED = {name.lower(): variant for name, variant in FEED_FORWARDS.items() if variant[1]}


def plain_to_gated(
    config: ModelConfig, tensors: Mapping[str, Tensor], target: str = "swiglu"
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with a gated feed-forward.

    What is exact: Swish to SwiGLU, ReLU to ReGLU, GELU to GEGLU (of either GELU). The activation's branch is the old first matrix
    under its new name `gate_proj`, and the other branch, `up_proj`, is zero with a bias of one. Finite hidden states give bit for
    bit the old values, since x V is 0, 0 + 1 is 1, and h * 1 is h, in every dtype.

    What is not: another activation (ReLU is z sigmoid(b z) only for b to infinity, at distance 0.2785 / b; GELU is z sigmoid(1.702 z)
    to 0.0203, Hendrycks and Gimpel 2016, section 2), and a gate without a bias, as a linear function of the normed hidden
    state cannot be one everywhere. So the result has `mlp_bias`, new zeros for the biases the model had not, and each layer
    grows by one matrix: it is wider than Shazeer's equal-parameter variant.

    Args:
        config: of a model whose feed-forward is plain.
        tensors: its state dict.
        target: `swiglu`, `reglu` or `geglu`.

    Returns:
        The new configuration, of the Llama family if that can express it (then transformers and others load it), and the
        new state dict; tensors that do not change are the ones passed in.

    Raises:
        ConfigError: the feed-forward is gated already, or the target has another activation.
    """
    if target.lower() not in GATED:
        raise ConfigError(f"feed-forward {target!r} is not a gated one", fix=f"Choose one of {', '.join(GATED)}.")
    if config.gated:
        raise ConfigError(
            f"the feed-forward is gated already: {config.feed_forward}", fix="Only plain feed-forwards are converted."
        )
    own = "gelu" if config.hidden_act == "gelu_pytorch_tanh" else config.hidden_act
    if GATED[target.lower()][0] != own:
        exact = next((name for name, (act, _) in GATED.items() if act == own), None)
        raise ConfigError(
            f"a {config.feed_forward} feed-forward has no exact form as {target}",
            fix=f"Its exact gated form is {exact}." if exact else "It has none.",
        )
    gated = replace(config, gated=True, mlp_bias=True)
    converted = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        first, down = tensors[f"{prefix}up_proj.weight"], tensors[f"{prefix}down_proj.weight"]
        bias, inner, hidden = tensors.get(f"{prefix}up_proj.bias"), first.shape[0], down.shape[0]
        converted |= {
            f"{prefix}gate_proj.weight": first,
            f"{prefix}gate_proj.bias": bias if bias is not None else first.new_zeros(inner),
            f"{prefix}up_proj.weight": torch.zeros_like(first),
            f"{prefix}up_proj.bias": first.new_ones(inner),
            f"{prefix}down_proj.weight": down,
            f"{prefix}down_proj.bias": tensors.get(f"{prefix}down_proj.bias", first.new_zeros(hidden)),
        }
    return replace(gated, model_type="llama") if _is_llama(gated) else gated, converted


def _is_llama(config: ModelConfig) -> bool:
    """Whether transformers' Llama has everything that a model of our own type asks for."""
    llama: dict[str, Any] = {
        "norm": "rms_norm",
        "qk_norm": False,
        "sliding_window": None,
        "output_bias": config.qkv_bias,
    }
    return config.model_type == OWN and all(getattr(config, name) == value for name, value in llama.items())
