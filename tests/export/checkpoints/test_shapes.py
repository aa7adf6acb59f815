"""The tensors a model must have, reckoned, against the ones its decoder really has."""

from dataclasses import replace

import pytest
import torch
from multi_head_toy import MHA, VARIANTS

from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.model.decoder import Decoder

CONFIGS = VARIANTS | {
    "tied": replace(MHA, tie_word_embeddings=True),
    "plain feed-forward": replace(MHA, gated=False, mlp_bias=True),
    "LayerNorm": replace(MHA, norm="layer_norm"),
    "odd sizes": replace(MHA, num_key_value_heads=1, head_dim=6, intermediate_size=31, num_hidden_layers=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_the_decoders_in_its_order(config) -> None:
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    assert list(expected_shapes(config).items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]
