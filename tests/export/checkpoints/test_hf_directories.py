"""Directories as people really have them: old shards beside a new file, tied heads, base models, pointers, adapters, links."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cache import hub_snapshot
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from headfold.export.checkpoints.directories import hub
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.checkpoints.side_files import read_json, side_files
from headfold.export.checkpoints.tokenizer_of_parts import with_tokenizer
from headfold.export.exportables.opening import open_exportable
from headfold.runtime.errors import CheckpointError

SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def directory(toy_checkpoint: Path, tmp_path: Path) -> Path:
    for path in toy_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def same_as_transformers(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = model.state_dict()
    assert {n for n in theirs if n != HEAD or not checkpoint.config.tie_word_embeddings} == set(checkpoint)
    for name in checkpoint:
        assert torch.equal(checkpoint.read(name).float(), theirs[name]), name


def test_a_single_file_wins_over_an_index_and_older_shards(directory) -> None:
    old = {name: tensor + 1 for name, tensor in load_file(directory / SINGLE).items()}
    save_file(old, directory / SHARD, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(old, SHARD)}))
    same_as_transformers(directory)


def test_an_index_may_list_a_tied_head_that_no_shard_has(directory) -> None:
    tensors = load_file(directory / SINGLE)
    tensors.pop(HEAD, None)
    (directory / SINGLE).unlink()
    save_file(tensors, directory / SHARD, metadata={"format": "pt"})
    names = dict.fromkeys([*tensors, HEAD], SHARD)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    configure(directory, tie_word_embeddings=True)
    assert HEAD not in open_checkpoint(directory).shapes()


def test_a_tied_model_may_store_the_head_alone(directory) -> None:
    def head_alone(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(HEAD, None)
        tensors[HEAD] = tensors.pop(EMBEDDING)

    configure(directory, tie_word_embeddings=True)
    expected = load_file(directory / SINGLE)[EMBEDDING]
    rewrite(directory, head_alone)
    assert torch.equal(open_checkpoint(directory).read(EMBEDDING), expected)


def test_a_checkpoint_of_the_base_model_has_the_same_tensors(directory) -> None:
    def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(HEAD, None)
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    configure(directory, tie_word_embeddings=True)
    rewrite(directory, without_prefix)
    same_as_transformers(directory)


def test_what_no_forward_pass_reads_is_left_aside_and_named(directory) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(4, 8),
        "v_head.summary.weight": torch.ones(1, 4),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    rewrite(directory, lambda tensors: tensors.update(extra))
    assert sorted(open_checkpoint(directory).ignored) == sorted(extra)
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"that this model does not have: model\.layers\.0\.mlp\.extra\.weight"):
        open_checkpoint(directory)


def test_a_left_over_quantization_config_and_pretraining_tp_do_nothing(directory) -> None:
    configure(directory, quantization_config={"quant_method": "gptq", "bits": 4}, pretraining_tp=2)
    open_checkpoint(directory)
    rewrite(directory, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has no scales"):
        open_checkpoint(directory)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "generation_config.json"])
def test_pointers_of_git_lfs_are_named(name, directory) -> None:
    (directory / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: is a pointer of Git LFS.*git lfs pull"):
        open_checkpoint(directory)


def test_side_files_that_are_links_out_of_the_checkpoint_are_refused(directory, tmp_path_factory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("{}")
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is a link that leads out of the checkpoint"):
        open_checkpoint(directory)


def test_the_hubs_cache_is_all_links_and_opens(directory, tmp_path_factory) -> None:
    snapshot = hub_snapshot(directory, tmp_path_factory.mktemp("hub") / "models--org--toy")
    assert open_checkpoint(snapshot).tokenizer.files == open_checkpoint(directory).tokenizer.files


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "weights.bin", "a\0b.safetensors", ""])
def test_an_index_names_only_safetensors_files_beside_it(shard, directory) -> None:
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: shard}}))
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        open_checkpoint(directory)


def test_a_download_takes_the_files_that_the_index_names_and_no_others(directory, monkeypatch) -> None:
    asked: list[list[str]] = []
    (directory / SINGLE).rename(directory / SHARD)
    names = load_file(directory / SHARD)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))

    def fake(name: str, allow_patterns: list[str], revision: str | None = None) -> str:
        asked.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert hub.download("org/toy") == directory
    assert SINGLE in asked[0]
    assert "*.safetensors" not in asked[0]
    assert asked[1] == [SHARD]


NAMED = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<eos>", "bos_token": None}
MAP = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "additional_special_tokens": ["<|im_end|>"]}
LISTED = {"content": "<tool>", "special": False, "lstrip": True, "rstrip": True, "normalized": False}
PARTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {  # model type, files
    "qwen2": ("llama", {"tokenizer_config": NAMED | {"tokenizer_class": "Qwen2Tokenizer"}}),
    "gpt2": ("llama", {"tokenizer_config": NAMED | {"tokenizer_class": "GPT2Tokenizer"}}),
    "no settings": ("qwen3", {}),
    "no class": ("qwen2", {"tokenizer_config": NAMED}),
    "a class that transformers overrules": ("qwen2", {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "a class that it does not": ("qwen3", {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}}),
    "special tokens in their map alone": (
        "llama",
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}, "special_tokens_map": MAP},
    ),
    "other special tokens": (
        "qwen2",
        {"tokenizer_config": NAMED | {"additional_special_tokens": ["<|im_end|>", "<tool>"], "sep_token": "<bos>"}},
    ),
    "added tokens": ("qwen2", {"tokenizer_config": NAMED, "added_tokens": {"<tool>": 300, "<call>": 301}}),
    "listed tokens": ("qwen2", {"tokenizer_config": NAMED | {"added_tokens_decoder": {"300": LISTED}}}),
    "a space before qwen2": ("qwen2", {"tokenizer_config": NAMED | {"add_prefix_space": True}}),
    "a space before gpt2": (
        "llama",
        {"tokenizer_config": NAMED | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    ),
    "a beginning and an end": (
        "qwen2",
        {"tokenizer_config": NAMED | {"bos_token": "<bos>", "add_bos_token": True, "add_eos_token": True}},
    ),
}
TEXTS = (
    "the quick fox",
    " Hello  world's 1234 ",
    "nai\u0308ve café\n\n  x",
    "a<eos>b <bos>",
    "<|im_end|> <tool> <call>x",
)


def in_parts(directory: Path, model_type: str, files: dict[str, dict[str, Any]]) -> None:
    """Take a directory's tokenizer apart, into the files that older checkpoints have."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    for name, content in ({"vocab": model["vocab"]} | files).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    configure(directory, model_type=model_type)


@pytest.mark.parametrize("case", PARTS)
def test_a_tokenizer_in_parts_is_put_together_as_transformers_does(case, directory) -> None:
    in_parts(directory, *PARTS[case])
    made = with_tokenizer(side_files(directory), read_json(directory / "config.json"), directory)
    ours, theirs = Tokenizer.from_buffer(made["tokenizer.json"]), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize("via", ["headfold", "transformers"])
def test_either_road_puts_it_together(via, directory) -> None:
    in_parts(directory, *PARTS["gpt2"])
    assert open_exportable(directory, via=via).tokenizer.definition is not None


def test_parts_of_an_unknown_class_are_named(directory) -> None:
    in_parts(directory, "llama", {})
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, and nothing names its class.*save_pretrained"):
        open_checkpoint(directory)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    with pytest.raises(
        CheckpointError, match=r"no tokenizer.json, and its class is 'MarianTokenizer'.*save_pretrained"
    ):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("added_tokens.json", "{"),
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"x": "y"}'),
        ("special_tokens_map.json", "[1]"),
        ("tokenizer_config.json", '{"additional_special_tokens": 7}'),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": "x"}}'),
    ],
)
def test_damaged_parts_are_one_line(name, content, directory) -> None:
    (directory / "tokenizer.json").unlink()
    for part, text in {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "{}", name: content}.items():
        (directory / part).write_text(text)
    configure(directory, model_type="qwen2")
    with pytest.raises(CheckpointError, match="the parts of its tokenizer make none"):
        open_checkpoint(directory)
