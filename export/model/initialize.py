"""Decoders to train: with fresh weights, or with a checkpoint's."""

import math

import torch

from headfold.export.checkpoints.base import Checkpoint, load_decoder
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


def trainable(checkpoint: Checkpoint, capacity: int | None = None) -> Decoder:
    """A float32 copy of the checkpoint's weights that can be trained."""
    decoder = load_decoder(checkpoint, torch.float32, capacity)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()  # a checkpoint may be another decoder's own tensors
    return decoder.requires_grad_(True).train()
