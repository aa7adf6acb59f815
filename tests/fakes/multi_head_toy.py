"""A random multi-head model to convert and its kin, text for it, and what conversion makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.opening import load_decoder
from headfold.export.conversion.checkpoint import Conversion, convert_checkpoint
from headfold.export.conversion.layers import ConvertOptions
from headfold.export.model.config import ModelConfig, RopeConfig
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter

QUIET = Reporter(quiet=True)
MHA = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=16,
    max_position_embeddings=64,
)
VARIANTS = {
    "plain": MHA,
    "biases": replace(MHA, qkv_bias=True, output_bias=True),
    "partial RoPE": replace(MHA, rope=RopeConfig(partial_rotary_factor=0.5)),
    "partial RoPE, biases": replace(MHA, rope=RopeConfig(partial_rotary_factor=0.5), qkv_bias=True, output_bias=True),
    "GQA": replace(MHA, num_key_value_heads=3),
    "q/k norm": replace(MHA, model_type="qwen3", qk_norm=True),
    "sliding window": replace(MHA, model_type="mistral", sliding_window=5, sliding_layers=(0, 1)),
}


def checkpoint_of(config: ModelConfig) -> MemoryCheckpoint:
    """Random weights, such that attention attends to something and every head differs."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if "norm" in name else 0.0)
    return MemoryCheckpoint(Path("random"), config, {n: t.detach() for n, t in decoder.state_dict().items()})


def tokens(rows: int = 16, length: int = 32) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1))


def converted(config: ModelConfig, *options: Any) -> Conversion:
    return convert_checkpoint(checkpoint_of(config), ConvertOptions(*options), tokens(), QUIET)


def logits(checkpoint: Any) -> torch.Tensor:
    return load_decoder(checkpoint)(tokens(2, 24)).logits
