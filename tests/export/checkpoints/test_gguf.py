"""GGUF files: written here with the gguf package's writer, and the real SmolLM2 against transformers' own GGUF reader."""

import struct
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_of_decoder import write

from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.exportables.transformers_road.transformers_oracle import oracle_of
from headfold.export.model.config import ModelConfig, RopeConfig
from headfold.runtime import CheckpointError, ConfigError

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    "llama yarn": (
        "llama",
        {"rope": RopeConfig(500.0, "yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "qwen2": ("qwen2", {"qkv_bias": True}),
    "qwen3": ("qwen3", {"qk_norm": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_come_back_as_they_were(variant, config, memory_checkpoint, tmp_path) -> None:
    model_type, fields = VARIANTS[variant]
    config: ModelConfig = replace(config, model_type=model_type, eos_token_id=(), **fields)
    checkpoint = memory_checkpoint(config)
    read = open_checkpoint(write(tmp_path / "m.gguf", checkpoint, model_type))
    assert read.config == config
    for name in checkpoint:
        torch.testing.assert_close(read.read(name), checkpoint.read(name), atol=0, rtol=0)


def test_quantized_weights_are_dequantized(config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(replace(config, hidden_size=64))
    read = open_checkpoint(write(tmp_path / "m.gguf", checkpoint, "llama", lambda _: gguf.GGMLQuantizationType.Q8_0))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        weight = checkpoint.read(name)
        blocks = weight.reshape(-1, 32)
        step = (
            blocks.abs().amax(1, keepdim=True) / 127
        )  # of Q8_0: 32 values share a scale, itself rounded to float16 (0.06)
        assert ((read.read(name).reshape(-1, 32) - blocks).abs() <= 0.57 * step).all()


def test_another_architecture_is_refused(config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "gptneox")
    with pytest.raises(ConfigError, match="no table of GGUF architecture 'gptneox'"):
        open_checkpoint(path)


def test_a_mixture_of_experts_is_refused(config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama", expert_count=8)
    with pytest.raises(ConfigError, match="mixture of experts"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@torch.inference_mode()
def test_transformers_computes_with_a_rope_that_it_does_not_read_there(
    kind, config, memory_checkpoint, tmp_path
) -> None:
    original = 16 if kind == "yarn" else 0
    rope = RopeConfig(500.0, kind, factor=4.0, original_max_position_embeddings=original)
    sizes = {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    model = memory_checkpoint(replace(config, rope=rope))
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", model, "llama", **sizes))
    oracle, tokens = oracle_of(checkpoint, torch.float32), np.arange(3, 35)
    assert oracle is not None
    right = torch.from_numpy(oracle.answer(tokens).logits)
    logits = load_decoder(checkpoint)(torch.from_numpy(tokens)[None]).logits[0]
    torch.testing.assert_close(logits, right, atol=1e-4, rtol=0)  # float32: of another RoPE they are off by 0.1


def test_a_model_that_transformers_takes_for_one_of_other_sizes_has_no_oracle_there(
    config, memory_checkpoint, tmp_path
) -> None:
    """Its qwen3 does not read heads' size, and takes 128."""
    small = memory_checkpoint(replace(config, model_type="qwen3", qk_norm=True))
    assert oracle_of(open_checkpoint(write(tmp_path / "m.gguf", small, "qwen3")), torch.float32) is None


def test_an_older_name_of_a_linear_rope(config, memory_checkpoint, tmp_path) -> None:
    """As llama.cpp's load_hparams reads it."""
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama", **{"rope.scale_linear": 4})
    assert open_checkpoint(path).config.rope == replace(config.rope, rope_type="linear", factor=4.0)


@pytest.mark.parametrize("name", ["attention.scale", "logit_scale", "rope.scaling.yarn_beta_fast"])
def test_metadata_that_changes_what_a_model_computes_is_refused(name, config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama", **{name: 12})
    with pytest.raises(ConfigError, match=f"its metadata llama.{name} is 12, which headfold does not read"):
        open_checkpoint(path)


@pytest.mark.parametrize("offset", [0, 1, 2**64 - 32])
def test_a_tensor_that_is_not_behind_the_one_before_is_refused(offset, config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama")
    content, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4  # behind its dimensions and type
    content[at : at + 8] = struct.pack("<Q", offset)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"it has tensor blk.1.ffn_up.weight at {offset}, not at "):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000])
def test_a_truncated_file_is_refused(keep, config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is no GGUF file, or a damaged one"):
        open_checkpoint(path)


@pytest.mark.slow  # the proof in test_smollm2 has transformers for its oracle, too
@pytest.mark.real
@torch.inference_mode()
def test_smollm2_equals_transformers(smollm2) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    decoder = load_decoder(open_checkpoint(smollm2))
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    prompts = ["The gate of a GLU decides what passes.", "Paris", "1 2 3 4 5 6 7"]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    cache = decoder.new_cache(len(rows), 64)
    prefill = decoder(ids, mask, cache).logits
    decode = decoder(torch.full((3, 1), 42), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1), cache).logits
    for i, row in enumerate(rows):
        expected = reference(torch.tensor([[*row, 42]])).logits[0]
        alone = decoder(torch.tensor([[*row, 42]])).logits[0]
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(prefill[i, -len(row) :], expected[:-1], atol=1e-4, rtol=0)
        torch.testing.assert_close(decode[i], expected[-1:], atol=1e-4, rtol=0)


@pytest.mark.real
def test_smollm2s_tokenizer_equals_transformers(smollm2, tmp_path) -> None:
    from transformers import AutoTokenizer

    from headfold.runtime.text import Text

    for name, content in open_checkpoint(smollm2).tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = Text(tmp_path), AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in (
        "Hello, world!  Two  spaces",
        "12345 and 6",
        "naïve café 😀 漢字",
        "\n\ttabs\n\n",
        "it's <|im_start|>user",
    ):
        assert ours.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat_prompt(messages) == expected
    assert "SmolLM" in expected  # the template's own system message
