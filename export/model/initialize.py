"""Decoders with fresh weights, to train."""

import math

import torch

from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder

_STD = 0.02
_RESIDUAL = ("o_proj.weight", "down_proj.weight")  # what is added to the residual stream


def new_decoder(config: ModelConfig, seed: int, capacity: int | None = None) -> Decoder:
    """A decoder as GPT-2 begins (Radford et al. 2019, section 2.3): N(0, 0.02), residual projections over sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config, capacity)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            scale = _STD / (math.sqrt(2 * config.num_hidden_layers) if name.endswith(_RESIDUAL) else 1)
            torch.nn.init.normal_(parameter, std=scale, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return decoder
