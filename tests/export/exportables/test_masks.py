"""What a model lets tokens see is learned from its mask function on numbers; what is neither causal nor a window is refused by name."""

from collections.abc import Callable

import pytest
import torch
from random_transformers import random_model
from transformers import LlamaConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from headfold.export.exportables.transformers_road.in_memory import transformers_in_memory
from headfold.export.exportables.transformers_road.masks import _mask
from headfold.runtime.errors import ConfigError

CONFIG = LlamaConfig(max_position_embeddings=1024)
PADDING = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize(
    ("function", "size", "window"),
    [
        (causal_mask_function, None, -1),
        (sliding_window_causal_mask_function(9), 9, 9),
        (sliding_window_causal_mask_function(1), 1, 1),
        (sliding_window_causal_mask_function(1000), 1000, 1000),
        (sliding_window_causal_mask_function(4096), 4096, 4096),  # never reached
        (sliding_window_causal_mask_function(10), 9, None),
        (sliding_window_causal_mask_function(300), None, None),
        (chunked_causal_mask_function(100, PADDING), 100, None),
        (chunked_causal_mask_function(100, PADDING.to("meta")), 100, None),
        (bidirectional_mask_function, None, None),
        (sliding_window_bidirectional_mask_function(9), 9, None),
        (or_masks(causal_mask_function, lambda b, h, q, k: q // 100 == k // 100), None, None),
    ],
)
def test_a_mask_is_a_window_or_nothing(function: Callable[..., torch.Tensor], size, window) -> None:
    visible = _mask(function, CONFIG, size)
    assert visible is not None
    assert visible.window == window


def test_a_window_that_only_the_mask_knows_is_found() -> None:
    facts = transformers_in_memory(random_model("phimoe")).facts  # whose attention is not told of it
    assert [layer.window for layer in facts.layers] == [9, 9, 9]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama4_text", {}, "Llama4TextAttention: has tokens see in a pattern of its own"),
        ("llama", {"is_causal": False}, "LlamaAttention: attends in both directions"),
        ("doge", {}, "computes with its attention mask"),
        ("bloom", {}, "bloom attends by code of its own (with ALiBi?)"),
        ("lfm2", {}, "has a state beside keys and values"),
        (
            "deepseek_v3",
            {},
            "DeepseekV3Attention: has values of size 16 and keys of size 32 (multi-head latent attention?)",
        ),
    ],
)
def test_what_the_op_cannot_see_is_refused_by_name(model_type, changes, message) -> None:
    with pytest.raises(ConfigError) as caught:
        transformers_in_memory(random_model(model_type, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
