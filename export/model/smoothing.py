"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): what comes before a product is divided by a factor for each channel, the product's
weight multiplied by it, so that large inputs are rounded with less loss.

Factors are powers of two, so the model computes bit for bit what it did: 2^e with an exponent e for each channel of a seam.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headfold.export.model.config import ModelConfig

LARGEST = 12  # of an exponent's magnitude; factors far from 1 would only trade one loss for another
Exponents = Mapping[str, Tensor]  # of each smoothed seam, int64 [K]


@dataclass(frozen=True)
class Seam:
    """A place in a layer where a factor for each channel can go out of one tensor into others."""

    divided: tuple[
        str, ...
    ]  # along their first axis: a weight, and its bias if there is one; the first one's name is the seam's
    readers: tuple[str, ...]  # weights [N, K] that are multiplied along K

    @property
    def name(self) -> str:
        """See `divided`."""
        return self.divided[0]


def seams(config: ModelConfig, layer: int) -> list[Seam]:
    """The norms, and between a gated feed-forward's two linear parts; in the order in which a layer computes."""
    prefix = f"model.layers.{layer}."
    parts = ("weight",) if config.norm == "rms_norm" else ("weight", "bias")
    inner = ("gate_proj", "up_proj") if config.gated else ("up_proj",)

    def named(module: str, *kinds: str) -> tuple[str, ...]:
        return tuple(f"{prefix}{module}.{kind}" for kind in kinds)

    found = [
        Seam(named("input_layernorm", *parts), sum((named(f"self_attn.{x}_proj", "weight") for x in "qkv"), ())),
        Seam(named("post_attention_layernorm", *parts), sum((named(f"mlp.{x}", "weight") for x in inner), ())),
    ]
    if config.gated:
        up = ("weight", "bias") if config.mlp_bias else ("weight",)
        found.append(Seam(named("mlp.up_proj", *up), named("mlp.down_proj", "weight")))
    return found


def shifts(config: ModelConfig, exponents: Exponents) -> Iterator[tuple[str, int, Tensor]]:
    """What smoothing does: a tensor's name, the axis, and the exponents that are added along it."""
    for layer in range(config.num_hidden_layers):
        for seam in seams(config, layer):
            if seam.name in exponents:
                yield from ((name, 0, -exponents[seam.name]) for name in seam.divided)
                yield from ((name, 1, exponents[seam.name]) for name in seam.readers)


def shifted(tensor: Tensor, axis: int, exponents: Tensor) -> Tensor:
    """Multiplied by 2^exponents along an axis, in float32."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return torch.ldexp(tensor.float(), exponents.view(shape))
