"""The command line end to end, on the toy: export, verify, inspect, generate, chat."""

import errno
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from headfold.export.bundle import pipeline
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.cli.shared import write_file
from headfold.export.graph.weights import attach_weights
from headfold.runtime.errors import InputError


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def exported(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A bundle made by the command, its JSON and what it said on the way."""
    path = tmp_path_factory.mktemp("cli") / "bundle"
    result = run("export", toy_checkpoint, "-o", path, "--decode-steps", 4, "--json")
    assert result.exit_code == 0, result.output
    return path, json.loads(result.stdout), result.stderr


def test_export_tells_what_it_did(exported) -> None:
    path, content, log = exported
    assert content["bundle"] == str(path)
    assert content["manifest"]["parity"]["passed"] is True
    assert content["manifest"]["parity"]["top1_agreement"] == 1.0
    assert "peak memory of the export" in log
    assert log.count("\n") == len(log.splitlines())  # plain lines, no cursor movements
    assert "\x1b" not in log


def test_a_bundle_has_what_the_contract_names(exported) -> None:
    path, content, _ = exported
    assert {entry.name for entry in path.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "genai_config.json",
        "parity.json",
        "manifest.json",
    }
    manifest = content["manifest"]
    assert [value["name"] for value in manifest["inputs"][:4]] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert manifest["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 1, 300]}
    assert manifest["cache"]["capacity"] == 64
    assert {"headfold", "torch", "onnx"} <= set(manifest["tools"])


def test_verify(exported, toy_checkpoint, tmp_path) -> None:
    path = exported[0]
    result = run("verify", path, "--against", toy_checkpoint, "--decode-steps", 2)
    assert result.exit_code == 0, result.output
    assert "all within tolerance" in result.stderr
    other = tmp_path / "other"
    other.mkdir()
    for entry in toy_checkpoint.iterdir():
        (other / entry.name).write_bytes(entry.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = run("verify", path, "--against", other, "--decode-steps", 2, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["first_bad_layer"] == 1
    assert "first bad layer 1" in result.stderr.splitlines()[-1]


def test_a_failed_export_publishes_nothing(toy_checkpoint, tmp_path, monkeypatch) -> None:
    def attach_another_weight(model: ir.Model, *arguments: Any) -> int:
        total = attach_weights(model, *arguments)
        weight = model.graph.initializers["model.norm.weight"]
        weight.const_value = ir.tensor(1.01 * weight.const_value.numpy(), name=weight.name)
        return total

    monkeypatch.setattr(pipeline, "attach_weights", attach_another_weight)
    result = run("export", toy_checkpoint, "-o", tmp_path / "b", "-q", "--decode-steps", 1)
    assert result.exit_code == 1
    assert "differs from PyTorch in" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_generate_keeps_to_a_schema_and_to_a_grammar(exported, tmp_path) -> None:
    schema, grammar, broken = tmp_path / "schema.json", tmp_path / "grammar.lark", tmp_path / "broken.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": false}'
    )
    grammar.write_text('start: "yes" | "no"')
    broken.write_text("{")
    assert run("generate", exported[0], "the", "--json-schema", schema).stdout == '{"a": 1}\n'
    assert run("generate", exported[0], "the", "--grammar", grammar).stdout in ("yes\n", "no\n")
    result = run("generate", exported[0], "the", "--json-schema", broken)
    assert (result.exit_code, "broken.json: is not JSON" in result.stderr) == (2, True)


def test_generate_is_the_decoders_greedy_text(exported, toy_checkpoint, tokenizer) -> None:
    result = run("generate", exported[0], "the quick", "-n", 8, "--json")
    (answer,) = json.loads(result.stdout)
    decoder = load_decoder(open_checkpoint(toy_checkpoint))
    tokens = tokenizer.encode("the quick").ids
    for _ in range(8):
        tokens.append(int(decoder(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert answer["token_ids"] == tokens[-8:]
    assert answer["text"] == tokenizer.decode(tokens[-8:])
    assert run("generate", exported[0], "the quick", "-n", 8).stdout == answer["text"] + "\n"
    assert run("generate", exported[0], "-", "-n", 8, stdin="the quick").stdout == answer["text"] + "\n"
    batch = json.loads(run("generate", exported[0], "the quick", "dog", "-n", 8, "--json").stdout)
    assert batch[0] == answer


def test_the_bundles_stop_strings_count_until_others_are_given(exported, toy_checkpoint, tmp_path) -> None:
    text = run("generate", exported[0], "the quick", "-n", 8).stdout.rstrip("\n")
    checkpoint, bundle = shutil.copytree(toy_checkpoint, tmp_path / "checkpoint"), tmp_path / "bundle"
    (checkpoint / "generation_config.json").write_text(json.dumps({"stop_strings": text[3:5]}))
    assert run("export", checkpoint, "-o", bundle, "--no-verify").exit_code == 0
    assert run("generate", bundle, "the quick", "-n", 8).stdout == text[: text.index(text[3:5])] + "\n"
    assert run("generate", bundle, "the quick", "-n", 8, "--stop", "no such text").stdout == text + "\n"


def test_a_chat_that_no_longer_fits_forgets_its_oldest_turns(exported) -> None:
    question = "the quick brown fox " * 2
    result = run("chat", exported[0], "-n", 6, "--system", "be brief", stdin=f"{question}\n" * 6)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) >= 6
    assert "headfold: the conversation no longer fits: its oldest turn is left out" in result.stderr
    alone = run("chat", exported[0], "-n", 6, stdin=f"{'the quick ' * 200}\n")
    assert alone.exit_code == 2
    assert "over the bundle's capacity" in alone.stderr


def test_chat_remembers(exported) -> None:
    first = run("chat", exported[0], "-n", 6, stdin="fox\n")
    assert first.exit_code == 0, first.output
    both = run("chat", exported[0], "-n", 6, stdin="fox\ndog\n\nnot read\n")
    assert (both.exit_code, both.stderr) == (0, "")
    answer = first.stdout.rstrip("\n")
    assert both.stdout.startswith(answer)
    alone = run("chat", exported[0], "-n", 6, stdin="dog\n").stdout
    assert both.stdout != answer + "\n" + alone  # the second answer depends on the first exchange


def test_inspect(exported, toy_checkpoint) -> None:
    facts = json.loads(run("inspect", toy_checkpoint, "--json").stdout)
    assert facts["kind"] == "checkpoint"
    assert (facts["attention"], facts["feed_forward"]) == ("GQA", "SwiGLU")
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
    assert facts["parameters"] == sum(
        tensor.numel() for tensor in load_file(toy_checkpoint / "model.safetensors").values()
    )
    bundle = json.loads(run("inspect", exported[0], "--json").stdout)
    assert bundle["parameters"] == facts["parameters"]
    assert bundle["parity"]["passed"] is True
    assert bundle["targets"] == ["onnxruntime"]
    table = run("inspect", exported[0]).stdout
    assert "SwiGLU" in table
    assert "kv bytes per token" in table


def test_help_is_quick_and_has_examples() -> None:
    result = run("export", "--help")
    assert "headfold export ./SmolLM2-135M-Instruct -o smol" in result.stdout.replace("\n", " ")
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "pydantic"}
    code = f"import sys, headfold.export.cli.root; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_report_is_replaced_whole_and_refused_before_the_work_where_it_cannot_be_written(
    toy_checkpoint, tmp_path, monkeypatch
) -> None:
    def convert(report: Path) -> Result:
        small = ("--kv-heads", 1, "--calibration-tokens", 64, "--calibration-length", 16)
        return run("convert", toy_checkpoint, "-o", tmp_path / "made", *small, "--report", report, "-q")

    report = tmp_path / "report.json"
    report.write_text("old")
    for place, wrong in ((tmp_path / "no" / "r", "is no directory"), (tmp_path, "is a directory")):
        result = convert(place)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert wrong in result.stderr
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left"):
            write_file(report, {})
    assert report.read_text() == "old"
    assert convert(report).exit_code == 0
    assert json.loads(report.read_text())["kv_heads"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "report.json"]


def test_a_number_that_json_has_not_is_null(tmp_path) -> None:
    write_file(tmp_path / "report.json", {"kl": math.nan, "of": [math.inf, 1.5], "name": "x"})
    assert json.loads((tmp_path / "report.json").read_text()) == {"kl": None, "of": [None, 1.5], "name": "x"}


def full(_: int) -> None:
    """A disk that is full, as fsync has it."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_bad_usage_exits_with_2() -> None:
    assert run("export").exit_code == 2
    assert run("export", "x", "-o", "y", "--dtype", "int3").exit_code == 2
