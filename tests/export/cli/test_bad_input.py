"""What a user can do wrong: one line that names it, exit code 2, no traceback, and nothing left behind."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main


@pytest.fixture
def checkpoint(toy_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(toy_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


def fails(arguments: list[str], *parts: str, stdin: str = "") -> None:
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("headfold: error: ")
    for part in parts:
        assert part in lines[0]
    assert lines[0].endswith(".")  # the remedy is a sentence
    assert "Traceback" not in result.output


def config(**fields: Any) -> Callable[[Path], None]:
    """Changes config.json; None removes a field."""

    def change(path: Path) -> None:
        content = json.loads((path / "config.json").read_text()) | fields
        content = {name: value for name, value in content.items() if value is not None}
        (path / "config.json").write_text(json.dumps(content))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = load_file(path / "model.safetensors")
        change(content)
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def resave(shard_bytes: int, after: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        save_hf(path.parent / "sharded", open_checkpoint(path), torch.float32, shard_bytes)
        shutil.rmtree(path)
        (path.parent / "sharded").rename(path)
        after(path)

    return apply


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:keep]) and None


def swap_for_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def damaged_index(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    first, *_, last = index["weight_map"]
    index["weight_map"][first] = index["weight_map"][last]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated safetensors": (truncate("model.safetensors", 5000), "is damaged"),
    "safetensors header cut": (truncate("model.safetensors", 5), "is damaged"),
    "absurd header length": (
        lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "is damaged",
    ),
    "missing shard": (resave(60_000, lambda p: next(p.glob("*-00002-*")).unlink()), "shard is missing"),
    "index points to the wrong shard": (resave(60_000, damaged_index), "is not in it, though"),
    "index leads out": (
        resave(
            60_000, lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.bin"}}')
        ),
        "names '../model.bin', which is no safetensors file beside it",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
    "only a pickle": (swap_for_pickle, "pickles are never loaded"),
    "missing tensor": (tensors(lambda t: t.pop(Q)), f"1 tensor missing: {Q}"),
    "extra tensor": (tensors(lambda t: t.update(extra=torch.ones(2))), "1 tensor that this model does not have: extra"),
    "wrong shape": (tensors(lambda t: t.update({Q: t[Q][:8].clone()})), f"{Q} [8, 48] instead of [96, 48]"),
    "wrong dtype": (tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"tensor {Q} is I8"),
    "NaN weights": (tensors(lambda t: t[NORM].fill_(float("nan"))), f"tensor {NORM} holds NaN or infinity"),
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (truncate("config.json", 40), "is not JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "is no JSON object"),
    "unknown model_type": (config(model_type="llamax"), "transformers cannot read its configuration"),
    "a model with a state": (config(model_type="mamba"), "mamba has a state beside keys and values"),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "is no tokenizer"),
    "broken template": (
        lambda p: (p / "chat_template.jinja").write_text("{% for m in messages %}"),
        "its chat template is broken",
    ),
    "broken generation settings": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "checkpoint/generation_config.json: eos_token_id",
    ),
    "tokenizer settings that are no object": (
        lambda p: (p / "tokenizer_config.json").write_text("[]"),
        "checkpoint/tokenizer_config.json: is no JSON object",
    ),
    "tokenizer settings cut off": (truncate("tokenizer_config.json", 5), "checkpoint/tokenizer_config.json: is not"),
    "special tokens that are no object": (
        lambda p: (p / "special_tokens_map.json").write_text("7"),
        "checkpoint/special_tokens_map.json: is no JSON object",
    ),
    "no model_type": (config(model_type=None), "model_type is missing"),
    "an activation that only transformers has, and with parameters": (config(hidden_act="xielu"), "missing tensors: "),
    "unknown activation": (config(hidden_act="nonsense"), "nonsense"),
    "unknown RoPE": (
        config(rope_parameters={"rope_type": "nonsense", "factor": 2.0}),
        "nonsense",
    ),
    "RoPE that is another one once the text is long": (
        config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "its RoPE (dynamic) depends on the length of the text",
    ),
    "RoPE without its factor": (config(rope_parameters={"rope_type": "linear"}), "rope: factor is missing"),
    "heads not divisible by KV heads": (
        config(num_key_value_heads=4),
        "num_attention_heads 6 is not divisible by num_key_value_heads 4",
    ),
    "heads do not divide the width": (config(head_dim=None, num_attention_heads=7), "hidden_size 48 is not divisible"),
    "a number is text": (config(num_hidden_layers="two"), "num_hidden_layers is 'two'"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "more layers than tensors": (config(num_hidden_layers=3), "tensors missing: model.layers.2."),
    "fewer layers than tensors": (config(num_hidden_layers=1), "that this model does not have: model.layers.1."),
    "an epsilon that float32 has not": (config(rms_norm_eps=1e39), "config.json: rms_norm_eps is 1e+39"),
    "a million layer types": (config(layer_types=["full_attention"] * 10**6), "layer_types has 1,000,000 items"),
    "a base without an end": (config(rope_parameters={"rope_theta": float("inf")}), "rope_theta is inf"),
    "odd RoPE": (config(head_dim=15), "rotates 15 dimensions"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case, checkpoint, tmp_path) -> None:
    damage, message = CHECKPOINTS[case]
    damage(checkpoint)
    (tmp_path / "out").mkdir()
    fails(["export", str(checkpoint), "-o", str(tmp_path / "out" / "bundle"), "--no-verify", "-q"], message)
    assert list((tmp_path / "out").iterdir()) == []


def change_manifest(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text()) | fields
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (path / "model.onnx.data").write_bytes(data)


BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed byte": (flip_a_byte, "model.onnx.data: does not have the SHA-256 of the manifest"),
    "truncated data": (truncate("model.onnx.data", 1000), "has 1000 bytes, not the"),
    "missing tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "unlisted file": (lambda p: (p / "notes.txt").write_text("x"), "notes.txt: is not listed in the manifest"),
    "newer format": (change_manifest(format_version=99), "has format version 99"),
    "unknown field": (change_manifest(surprise=1), "surprise: Extra inputs are not permitted"),
    "manifest is no JSON": (truncate("manifest.json", 10), "is not JSON"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "file outside the bundle": (
        change_manifest(files={"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "points outside the bundle",
    ),
    "no bundle": (shutil.rmtree, "no such bundle directory"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_bundles(case, bundle) -> None:
    damage, message = BUNDLES[case]
    damage(bundle)
    fails(["generate", str(bundle), "the fox", "-n", "2"], message)


PROMPTS: dict[str, tuple[list[str], str, str]] = {
    "empty prompt": ([""], "", "the prompt is empty"),
    "empty standard input": ([], "", "the prompt is empty"),
    "prompt over capacity": (["the fox " * 50], "", "over the bundle's capacity of 64"),
    "prompt and answer over capacity": (["the fox", "-n", "1000"], "", "over the bundle's capacity of 64"),
    "negative temperature": (["the fox", "--temperature", "-1"], "", "temperature is -1"),
    "top-p of 2": (["the fox", "--temperature", "1", "--top-p", "2"], "", "top_p is 2"),
    "unknown provider": (
        ["the fox", "--provider", "tpu"],
        "",
        "Invalid value for '--provider': 'tpu' is not one of 'cpu', 'cuda'.",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case, toy_bundle) -> None:
    arguments, stdin, message = PROMPTS[case]
    fails(["generate", str(toy_bundle), *arguments], message, stdin=stdin)


def test_outputs(checkpoint, bundle, tmp_path) -> None:
    """Nothing that exists is replaced by accident, or by force if it is no bundle."""
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    fails(["export", str(checkpoint), "-o", str(bundle), "-q"], "already exists", "--force")
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    fails(["export", str(checkpoint), "-o", str(bundle / "in"), "-q"], "is in a bundle. Choose a place that is not in")
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for force in ((), ("--force",)):  # which would be no help
        fails(["export", str(checkpoint), "-o", str(tmp_path / "home"), *force, "-q"], "is no bundle")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    fails(["export", str(checkpoint), "-o", str(tmp_path / "no" / "where"), "-q"], "is no directory")
    fails(["export", str(tmp_path / "nothing"), "-o", str(tmp_path / "b"), "-q"], "no such file or directory")


@pytest.mark.parametrize("capacity", ["0", "65"])
def test_capacities(capacity, checkpoint, tmp_path) -> None:
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--capacity", capacity, "-q"]
    fails(arguments, f"a capacity of {capacity} tokens", "Choose 1 to 64")


def test_a_bundle_of_another_model(checkpoint, bundle) -> None:
    config(rms_norm_eps=1e-3)(checkpoint)
    fails(["verify", str(bundle), "--against", str(checkpoint), "-q"], "was made from another model", "differ")


def test_inspecting_nothing(tmp_path) -> None:
    fails(["inspect", str(tmp_path / "nothing")], "no such file or directory")


def test_nan_can_be_allowed(checkpoint, tmp_path) -> None:
    tensors(lambda t: t[NORM].fill_(float("nan")))(checkpoint)
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--allow-nan", "--no-verify", "-q"]
    assert CliRunner().invoke(main, arguments).exit_code == 0


@pytest.mark.parametrize("name", [NORM, "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_that_is_allowed_is_proven_to_be_where_the_checkpoint_has_it(name, dtype, checkpoint, tmp_path) -> None:
    tensors(lambda t: t[name].view(-1)[3::48].fill_(float("nan")))(checkpoint)
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--allow-nan", "--dtype", dtype, "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    fails(["generate", str(tmp_path / "b"), "the fox", "-n", "2"], "the logits of token 1 of answer 0 are NaN")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_weights_that_overflow_are_no_model(dtype, checkpoint, tmp_path) -> None:
    tensors(lambda t: [t[f"model.layers.0.mlp.{part}_proj.weight"].fill_(1e38) for part in ("up", "down")])(checkpoint)
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--dtype", dtype, "-q"]
    fails(arguments, "its logits are NaN or infinite in PyTorch, too")
    assert not (tmp_path / "b").exists()
    result = CliRunner().invoke(main, [*arguments, "--allow-nan"])
    assert result.exit_code == 0, result.output


def test_more_to_calibrate_on_than_anybody_writes(checkpoint, tmp_path) -> None:
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--kv-cache", "int8", "-q"]
    fails(
        [*arguments, "--calibration-tokens", "10000000000000"], "--calibration-tokens: is 10000000000000.", "1,048,576"
    )


@pytest.mark.parametrize("data", [[], ["--data", "DATA"]])
def test_a_quantized_cache_of_nan_is_refused(data, checkpoint, tmp_path) -> None:
    tensors(lambda t: t["model.embed_tokens.weight"][:, 3].fill_(float("nan")))(checkpoint)
    (tmp_path / "text.txt").write_text("the lazy dog " * 99)
    given = [str(tmp_path / "text.txt") if part == "DATA" else part for part in data]
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--allow-nan", "--kv-cache", "int8", "-q"]
    fails([*arguments, *given], "NaN or infinity")


def test_debug_shows_the_traceback(tmp_path, monkeypatch) -> None:
    arguments = ["--debug", "inspect", str(tmp_path / "nothing")]
    monkeypatch.setattr("sys.argv", ["headfold", *arguments])
    result = CliRunner().invoke(main, arguments)
    assert type(result.exception).__name__ == "CheckpointError"


def test_a_full_disk(checkpoint, small_disk) -> None:
    disk = small_disk(200)  # KiB
    fails(["export", str(checkpoint), "-o", str(disk / "b"), "--no-verify", "-q"], "cannot write: No space left")
    small = ["--kv-heads", "1", "--init", "mean", "--calibration-tokens", "32", "--calibration-length", "16", "-q"]
    fails(["convert", str(checkpoint), "-o", str(disk / "c"), *small], "cannot write: No space left")
    assert list(disk.iterdir()) == []
