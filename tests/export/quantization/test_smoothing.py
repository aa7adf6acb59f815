"""Smoothing: the same function bit for bit, and products with rounded inputs that lose less."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.opening import load_decoder
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import SmoothedCheckpoint
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import restored, rounded, rounded_rows
from headfold.export.model.smoothing import LARGEST, seams, shifted
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running
from headfold.export.quantization.smoothing import best_exponents, exponents_of, find_smoothing

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def checkpoint(config: ModelConfig = CONFIG, outlier: float = 1.0) -> MemoryCheckpoint:
    """Random weights; one channel of every norm, and of every `up_proj`, is `outlier` times as large."""
    torch.manual_seed(0)
    decoder = Decoder(config).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name or "layernorm.weight" in name), std=0.2)
    for layer in decoder.model.layers:
        for weight in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.mlp.up_proj.weight):
            weight[5] *= outlier
    return MemoryCheckpoint(Path("memory"), config, decoder.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, norm="layer_norm", gated=False, hidden_act="relu", mlp_bias=True),
        replace(CONFIG, mlp_bias=True, qkv_bias=True),
    ],
    ids=["swiglu", "layer norm, not gated", "biases"],
)
def test_a_smoothed_model_computes_the_same_bit_for_bit(config) -> None:
    original, generator = checkpoint(config), torch.Generator().manual_seed(1)
    sizes = original.shapes()
    exponents = {
        seam.name: torch.randint(-4, 5, (sizes[seam.readers[0]][1],), generator=generator)
        for layer in range(2)
        for seam in seams(config, layer)
    }
    assert len(exponents) == (6 if config.gated else 4)
    smoothed, ids = SmoothedCheckpoint(original, exponents), torch.arange(40)[None]
    changed = {name for name in original if not torch.equal(smoothed.read(name), original.read(name))}
    norms = {name for name in original if "layernorm" in name}
    assert norms <= changed
    assert not any("o_proj" in name or "model.norm" in name or "embed" in name for name in changed)
    with torch.inference_mode():
        assert torch.equal(load_decoder(smoothed)(ids).logits, load_decoder(original)(ids).logits)


def product_error(x: torch.Tensor, weight: torch.Tensor, exponents: torch.Tensor) -> float:
    """Mean square of what rounding adds to a product."""
    now = rounded_rows(shifted(x, 1, -exponents)) @ restored(rounded(shifted(weight, 1, exponents), 7)).T
    return (now - x @ weight.T).square().mean().item()


def test_large_inputs_are_made_smaller_until_products_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator) for rows in (200, 24))
    none = torch.zeros(64, dtype=torch.int64)
    x[:, 3] *= 60
    weight[:, 3] /= 60
    found = best_exponents(x, x.abs().amax(0), [weight])
    assert found[3] > 2
    assert product_error(x, weight, found) < product_error(x, weight, none) / 10


def test_exponents_are_the_formula_of_the_paper_in_powers_of_two() -> None:
    inputs, weights = torch.tensor([1.0, 16, 256, 0, 1e30]), torch.tensor([1.0, 1, 4, 7, 1])
    found = exponents_of(inputs, weights, 0.5)  # sqrt(x / w): 1, 4, 8, none, 1e15; over their median, the lower of two
    assert found.tolist() == [-2, 0, 1, 0, LARGEST]
    assert not exponents_of(torch.zeros(3), torch.ones(3), 0.5).any()


def test_layers_with_outliers_are_smoothed_where_they_have_them() -> None:
    tokens = torch.arange(90).view(3, 30)
    source = OwnModel(checkpoint(outlier=100.0))
    model = Running(source, source.checkpoint, 30)
    found = find_smoothing(model, CONFIG, tokens, Reporter(quiet=True))
    assert set(found) == {seam.name for layer in range(2) for seam in seams(CONFIG, layer)}
    assert all(exponents[5] > 1 for exponents in found.values())
