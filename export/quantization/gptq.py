"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded column by column, each error made up for by the columns still to come.

Layer by layer, each on what the rounded layers before it hand on, so one layer and the residual streams are all that is in memory.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.model.decoder import Layer, sequence_layout
from headfold.export.model.rope import rope_tables
from headfold.export.model.rounding import Rounded, Width, block_scales, nearest, restored
from headfold.export.progress import Reporter
from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.errors import ConfigError

_TOGETHER = 2048  # tokens that go through a layer at a time
_DAMPING = 0.01  # of the mean of the second moments' diagonal, added to it (section 3.3 there)
_TRIED = [1 - 0.02 * step for step in range(16)]  # of the scale that holds the block's largest weight
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}


@torch.inference_mode()
def gptq_layers(
    checkpoint: Checkpoint, bits: Mapping[str, Width], tokens: Tensor, reporter: Reporter
) -> dict[str, Rounded]:
    """The layers' weights of four bits, calibrated on int64 tokens [N, S].

    Args:
        checkpoint: the model; what it holds beside these weights (its embedding, say) may be rounded already.
        bits: of each rounded weight. Those of eight are rounded to the nearest, which costs next to nothing.
        tokens: see above.
        reporter: told what goes on.
    """
    config, found = checkpoint.config, dict[str, Rounded]()
    hidden = F.embedding(tokens, checkpoint.read("model.embed_tokens.weight").float())  # [N, S, hidden]
    rope = rope_tables(config, tokens.shape[1])
    with reporter.step("round the layers with GPTQ", config.num_hidden_layers) as advance:
        for index in range(config.num_hidden_layers):
            layer, prefix = read_layer(checkpoint, index), f"model.layers.{index}."
            moments = _input_moments(layer, hidden, rope)
            for module_name, module in _linears(layer).items():
                name = f"{prefix}{module_name}.weight"
                if bits.get(name) == 4:
                    found[name] = gptq(module.weight, moments[_input_of(module_name)], 4)
                    module.weight.copy_(restored(found[name]))
            hidden = torch.cat([run_layer(layer, rows, rope) for rows in together(hidden)])
            advance(1)
    return found


def gptq(weight: Tensor, moments: Tensor, bits: Bits) -> Rounded:
    """Round a weight [N, K] whose inputs have these second moments, float64 [K, K], positive somewhere.

    Whole blocks and the columns in them go in the order of their inputs' size, largest first ("act order" of the authors' code), for
    the last ones have nobody to make up for them. A block's scale is found when its turn comes: the one of `_TRIED`, either sign, with
    the least error, weighed by the moments.

    Raises:
        ConfigError: the moments are not finite.
    """
    count, width = weight.shape
    power = moments.diagonal().clone()
    order = _order(power)
    inverse = _inverse_factor(moments[order][:, order])  # [K, K], upper triangular
    left = weight.double()[:, order]  # what is still to round, corrected
    power = power[order] + _DAMPING * power.mean()
    numbers = torch.empty(count, width, dtype=torch.int8)
    scales = torch.empty(count, width // BLOCK)
    for start in range(0, width, BLOCK):
        block = slice(start, start + BLOCK)
        step = best_scales(left[:, block], power[block], bits)  # [N]
        errors = torch.empty(count, BLOCK, dtype=torch.float64)
        for offset in range(BLOCK):
            column = start + offset
            chosen = nearest(left[:, column], step, bits)
            numbers[:, order[column]] = chosen.to(torch.int8)
            errors[:, offset] = (left[:, column] - chosen * step) / inverse[column, column]
            left[:, column : start + BLOCK] -= errors[:, offset, None] * inverse[column, column : start + BLOCK]
        left[:, start + BLOCK :] -= errors @ inverse[block, start + BLOCK :]
        scales[:, order[start] // BLOCK] = step.float()
    return Rounded(bits, numbers, scales)


def best_scales(blocks: Tensor, power: Tensor, bits: Bits) -> Tensor:
    """Scales [N] of blocks [N, BLOCK] with the least squared error, float32 numbers; `power` [BLOCK] weighs its columns."""
    largest = block_scales(blocks, bits)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in _TRIED:
        for sign in (1, -1):
            scales = (sign * factor * largest).float().to(blocks.dtype)
            wrong = blocks - nearest(blocks, scales[:, None], bits) * scales[:, None]
            error = wrong.square() @ power
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _order(power: Tensor) -> Tensor:
    """Columns, largest input first, but block by block: int64 [K]."""
    blocks = power.view(-1, BLOCK)
    within = blocks.sort(stable=True, descending=True).indices + torch.arange(0, len(power), BLOCK)[:, None]
    return within[blocks.sum(1).sort(stable=True, descending=True).indices].flatten()


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse (section 3.3, step 3)."""
    mean = moments.diagonal().mean().item() or 1.0
    for damping in (
        _DAMPING,
        10 * _DAMPING,
        100 * _DAMPING,
    ):  # inputs that are huge in a few columns leave the others to rounding
        factor, failed = torch.linalg.cholesky_ex(
            moments + damping * mean * torch.eye(len(moments), dtype=moments.dtype)
        )
        if not failed and factor.isfinite().all():
            return cast(Tensor, torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True))
    raise ConfigError("the inputs of its products are too large for GPTQ", fix="Use --rounding nearest.")


def read_layer(checkpoint: Checkpoint, index: int) -> Layer:
    """A layer alone, float32."""
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        layer = Layer(checkpoint.config, index)
    names = [name for name in checkpoint if name.startswith(prefix)]
    state = {name.removeprefix(prefix): checkpoint.read(name).float().clone() for name in names}
    layer.load_state_dict(state, assign=True)
    return layer.eval().requires_grad_(False)


def _input_moments(layer: Layer, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The sum of x x^T of what enters each product, float64 [K, K], by the name of the first product that it enters."""
    moments = dict[str, Tensor]()

    def hear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            now = (x.T @ x).double()
            moments[name] = moments[name] + now if name in moments else now

        return add

    linears = _linears(layer)
    hooks = [linears[name].register_forward_pre_hook(hear(name)) for name in {_input_of(name) for name in linears}]
    for rows in together(hidden):
        run_layer(layer, rows, rope)
    for hook in hooks:
        hook.remove()
    return moments


def _linears(layer: Layer) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _input_of(name: str) -> str:
    """The product whose input this one shares: "self_attn.q_proj" of "self_attn.k_proj"."""
    parent, own = name.rsplit(".", 1)
    return f"{parent}.{_SAME_INPUT.get(own, own)}"


def run_layer(layer: Layer, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """What a layer makes of streams [N, S, hidden] without a past."""
    ones = torch.ones(hidden.shape[:2], dtype=torch.long)
    return cast(Tensor, layer(hidden, sequence_layout(ones, ones), rope, None)[0])


def together(hidden: Tensor) -> tuple[Tensor, ...]:
    """Streams [N, S, hidden], as many sequences at a time as go through a layer together."""
    return torch.split(hidden, max(_TOGETHER // hidden.shape[1], 1))
