"""Our decoder against transformers, in both directions: their random models read by us, ours written for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headfold.export.checkpoints.families import config_from_json, config_to_json
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.checkpoints.side_files import read_json

TOLERANCE = 1e-5  # float32 logits of order 1: sums of a hundred products in another order, two layers
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama GQA": {"model_type": "llama"},
    "llama MHA": {"model_type": "llama", "num_key_value_heads": 6},
    "llama MQA, tied": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama head_dim is not hidden / heads": {"model_type": "llama", "head_dim": 32},
    "llama gelu": {"model_type": "llama", "hidden_act": "gelu"},
    "llama linear RoPE": {"model_type": "llama", "rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "llama llama3 RoPE": {"model_type": "llama", "rope_parameters": ROPE | LLAMA3},
    "llama yarn RoPE": {"model_type": "llama", "rope_parameters": ROPE | YARN},
    "llama yarn RoPE, all its fields": {
        "model_type": "llama",
        "rope_parameters": ROPE
        | YARN
        | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral window": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 window in the second layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True},
}


@pytest.fixture(params=CASES)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A random model of transformers, and its directory."""
    case = dict(CASES[request.param])
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.pop("model_type"), **SIZES | case)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:  # zeros and ones when new, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@torch.inference_mode()
def test_logits_equal_transformers(theirs) -> None:
    reference, path = theirs
    decoder = load_decoder(open_checkpoint(path))
    ids = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    torch.testing.assert_close(decoder(ids).logits, expected, atol=TOLERANCE, rtol=0)
    # with the cache: a prompt, then token by token
    cache = decoder.new_cache(3)
    actual = [decoder(ids[:, :15], None, cache).logits]
    for i in range(15, 20):
        actual.append(decoder(ids[:, i : i + 1], torch.ones(3, i + 1, dtype=torch.long), cache).logits)
    torch.testing.assert_close(torch.cat(actual, 1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_ragged_batch_equals_transformers_alone(side, theirs) -> None:
    reference, path = theirs
    decoder = load_decoder(open_checkpoint(path))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 101, (length,), generator=generator) for length in (3, 9, 14)]
    ids, mask = torch.zeros(2, 3, 14, dtype=torch.long)
    places = [slice(14 - len(p), 14) if side == "left" else slice(0, len(p)) for p in prompts]
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        ids[row, place], mask[row, place] = prompt, 1
    cache = decoder.new_cache(3)
    prefill = decoder(ids, mask, cache).logits
    following = torch.tensor([[5], [6], [7]])
    decode = decoder(following, torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1), cache).logits
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        expected = reference(torch.cat([prompt, following[row]])[None]).logits[0]
        torch.testing.assert_close(prefill[row, place], expected[:-1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(decode[row], expected[-1:], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_what_we_write_loads_in_transformers_unchanged(theirs, tmp_path) -> None:
    reference, path = theirs
    save_hf(tmp_path / "ours", open_checkpoint(path), torch.float32, max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, left over or of another shape
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, reference(ids).logits, atol=0, rtol=0)


def test_a_configuration_survives_the_round_trip(theirs) -> None:
    config = config_from_json(read_json(theirs[1] / "config.json"), "there")
    assert config_from_json(config_to_json(config), "here") == config


def test_transformers_4_spelling_of_rope() -> None:
    old = SIZES | {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert config_from_json(old, "old") == config_from_json(new, "new")
