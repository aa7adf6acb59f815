"""config.json as the ecosystem reads it: every field against transformers' own configuration and rotary embedding."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headfold.export.checkpoints.families import FAMILIES, config_from_json, config_to_json
from headfold.export.model.config import ModelConfig
from headfold.export.model.rope import rope_tables
from headfold.runtime.errors import ConfigError

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN | {"type": "yarn"}},
    {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_parameters": YARN | {"rope_theta": 5e5, "truncate": None}},
    {"rope_parameters": YARN | {"truncate": False, "beta_fast": 0, "beta_slow": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": YARN | {"factor": None}},
    {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    {"rope_parameters": YARN | {"attention_factor": 1.5}, "original_max_position_embeddings": 64},
    {"rope_parameters": YARN | {"original_max_position_embeddings": 64.0}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}, "rope_theta": 5e5},
    {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_scaling": None, "rope_parameters": None, "rope_theta": 5e4},
]
CHANGES: list[tuple[str, list[Any]]] = [  # ABSENT: not in the file
    ("num_key_value_heads", [2, 4, None, "ABSENT"]),
    ("head_dim", [16, 32, None, "ABSENT"]),
    ("hidden_act", ["silu", "gelu", "ABSENT"]),
    ("max_position_embeddings", [128, 256, "ABSENT"]),
    ("rms_norm_eps", [1e-5, "ABSENT"]),
    ("tie_word_embeddings", [True, False, "ABSENT"]),
    ("attention_bias", [True, False, "ABSENT"]),
    ("mlp_bias", [True, "ABSENT"]),
    ("sliding_window", [7, None, "ABSENT"]),
    ("use_sliding_window", [True, False, "ABSENT"]),
    ("max_window_layers", [0, 1, "ABSENT"]),
    ("eos_token_id", [[2, 4], 3, None, "ABSENT"]),
    ("bos_token_id", [1, None, "ABSENT"]),
    ("pretraining_tp", [2, None, "ABSENT"]),
    ("vocab_size", [96, "ABSENT"]),
    ("intermediate_size", [48, "ABSENT"]),
]


def drawn(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    content = dict(SMALL, model_type=rng.choice(list(FAMILIES)), **rng.choice(ROPES))
    for name, values in CHANGES:
        value = rng.choice(values)
        if value == "ABSENT":
            content.pop(name, None)
        else:
            content[name] = value
    if content["model_type"] == "qwen2" and content.get("head_dim", 0) is None:
        del content["head_dim"]  # which is the same, but transformers' YaRN multiplies null
    return content


def rotary(theirs: Any) -> tuple[torch.Tensor, float]:
    embedding = LlamaRotaryEmbedding(theirs)  # the same in all four families
    return embedding.inv_freq, embedding.attention_scaling


def assert_same(ours: ModelConfig, theirs: Any) -> None:
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.hidden_act == theirs.hidden_act
    eos = theirs.eos_token_id
    assert ours.eos_token_id == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
    assert ours.bos_token_id == theirs.bos_token_id
    biases = {"llama": theirs.get_text_config().__dict__.get("attention_bias"), "qwen2": True, "mistral": False}
    assert ours.qkv_bias == biases.get(theirs.model_type, getattr(theirs, "attention_bias", None))
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    slides = theirs.model_type in ("mistral", "qwen2", "qwen3") and window is not None
    expected = [window if slides and kind == "sliding_attention" else -1 for kind in types]
    assert [ours.window(layer) for layer in range(ours.num_hidden_layers)] == expected
    frequencies, factor = rotary(theirs)
    cos, sin = rope_tables(ours, 64)
    angles = torch.arange(64).float()[:, None] * frequencies[None].float()
    np.testing.assert_allclose(
        cos.numpy(), (angles.cos() * factor).numpy(), atol=2e-5
    )  # 64 x the rounding of a frequency
    np.testing.assert_allclose(sin.numpy(), (angles.sin() * factor).numpy(), atol=2e-5)


@pytest.mark.parametrize("seeds", range(0, 400, 50))
def test_they_are_read_as_transformers_reads_them_or_refused_where_it_refuses(seeds: int) -> None:
    read = 0
    for seed in range(seeds, seeds + 50):
        content = drawn(seed)
        try:
            theirs = AutoConfig.for_model(
                content["model_type"], **{k: v for k, v in content.items() if k != "model_type"}
            )
            rotary(theirs)
        except Exception:  # whatever its validation raises
            with pytest.raises(ConfigError):
                config_from_json(content, "config.json")
            continue
        if theirs.num_attention_heads % theirs.num_key_value_heads:  # a default that fits no such model
            with pytest.raises(ConfigError, match="not divisible by"):
                config_from_json(content, "config.json")
            continue
        assert_same(config_from_json(content, "config.json"), theirs)
        read += 1
    assert read > 20


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize("types", [None, [FULL] * 3, [SLIDING] * 3, [FULL, SLIDING, FULL]])
@pytest.mark.parametrize("window", [7, "ABSENT"])
def test_a_mistral_with_layer_types_is_read_as_the_ministral_that_transformers_makes_of_it(
    types: list[str] | None, window: Any, tmp_path: Path
) -> None:
    content = SMALL | {"model_type": "mistral", "layer_types": types}
    if window != "ABSENT":
        content["sliding_window"] = window
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "ministral"
    ours = config_from_json(content, "config.json")
    windows = [theirs.sliding_window if kind == SLIDING else -1 for kind in theirs.layer_types]
    assert [ours.window(layer) for layer in range(3)] == windows
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(ours)))
    again = AutoConfig.from_pretrained(tmp_path)
    kinds = getattr(again, "layer_types", None) or [SLIDING] * 3
    assert [again.sliding_window if again.sliding_window and kind == SLIDING else -1 for kind in kinds] == windows


def test_a_whole_number_may_be_written_as_a_float() -> None:
    content = SMALL | {"model_type": "llama", "max_position_embeddings": 8192.0}
    assert config_from_json(content, "config.json").max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama", "partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5, which transformers ignores",
        ),
        ({"model_type": "qwen3", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"model_type": "llama", "rope_parameters": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5 with linear RoPE: transformers does not run that",
        ),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types is"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3, "sliding_window": None},
            "sliding_window is null: transformers does not run such a model",
        ),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "sliding layers, and there is no window"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, "layer_types is"),
        ({"model_type": "llama", "hidden_act": None}, "hidden_act is null"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "rope: factor is missing"),
        (
            {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "must be an object of numbers",
        ),
        ({"model_type": "llama", "rope_parameters": {"rope_type": ["x"]}}, "rope_type ['x'] is not implemented"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "llama", "vocab_size": 10**15}, "vocab_size is 1000000000000000"),
        ({"model_type": "llama", "rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"model_type": "llama", "rms_norm_eps": 1e39}, "norm_eps is 1e+39"),
        ({"model_type": "llama", "rope_theta": float("inf")}, "rope_theta is inf"),
        ({"model_type": "qwen3", "rope_theta": 1e39}, "rope_theta is 1e+39"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 1e39}}, "factor is 1e+39"),
        ({"model_type": "mistral", "rope_scaling": YARN | {"attention_factor": -1e39}}, "attention_factor is -1e+39"),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 4}, "layer_types is"),
        ({"model_type": "llama", "layer_types": 3}, "layer_types is 3. It must name 3 layers"),
        ({"model_type": "llama", "eos_token_id": [1, "x"]}, "eos_token_id[1] is 'x'"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is unknown"),
        ({"model_type": "llama", "num_key_value_heads": True}, "num_key_value_heads is True"),
    ],
)
def test_what_cannot_be_meant_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_json(SMALL | changes, "config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": ["x"]}, "gated is ['x']"),
        ({"norm": ["rms_norm"]}, "norm ['rms_norm'] is not implemented"),
        ({"norm_eps": True}, "norm_eps is True"),
        ({"eos_token_id": ["x"]}, "eos_token_id is ('x',)"),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5"),
        ({"rope": {"truncate": 1}}, "truncate is 1"),
        ({"rope": {"rope_type": {}}}, "rope_type {} is not implemented"),
    ],
)
def test_wrong_types_in_a_configuration_of_ours_are_one_line(changes: dict[str, Any], message: str) -> None:
    """As a bundle's manifest has it, and as models that no family can express are saved."""
    whole = config_from_json(SMALL | {"model_type": "llama"}, "config.json").to_json()
    assert ModelConfig.from_json(whole | {"norm_eps": 1}).norm_eps == 1
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(whole | changes)
    assert message in str(error.value)
