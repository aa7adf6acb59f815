"""What inspect says a checkpoint can become is what the commands then do, and why not is what they would say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from quantized_weights import gptq
from random_transformers import save_random
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headfold.export.bundle.pipeline import CacheCalibration, ExportOptions, export_bundle
from headfold.export.checkpoints.directories.stored import Stored
from headfold.export.cli import main
from headfold.export.engine.lowering import lower
from headfold.export.engine.preflight import preflight
from headfold.export.engine.targets import Target, targets_of
from headfold.export.exportables.foreign.traced import ModelTensors
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.outline import outline
from headfold.export.exportables.tried import TRIED
from headfold.export.graph.trace import export_graph
from headfold.export.progress import Reporter
from headfold.runtime.errors import HeadfoldError
from headfold.runtime.manifest import MODEL

QUIET = Reporter(quiet=True)
CHANGES = ("convert", "uptrain", "sweep")


def targets(path: Path) -> dict[str, Target]:
    return {target.name: target for target in targets_of(open_exportable(path))}


def names(found: dict[str, Target]) -> set[str]:
    return {name for name, target in found.items() if target.possible}


def test_a_family_with_a_table_can_have_all(toy_checkpoint) -> None:
    found = targets(toy_checkpoint)
    assert names(found) == set(found)
    assert found["convert"].note == "--kv-heads 1, 2"
    assert found["onnxruntime-genai"].note == "as llama"


@pytest.mark.parametrize(
    ("model_type", "graphs", "why"),
    [
        pytest.param(
            "gemma2",
            {"native": "TensorRT ignores a soft cap. Use --attention plugin.", "plugin": ""},
            "as gemma2",
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma3_text", {"native": "", "plugin": ""}, "as gemma3_text", marks=pytest.mark.slow),
        ("qwen3_moe", dict.fromkeys(("native", "plugin"), "the model has a mixture of experts"), "as llama"),
        pytest.param(
            "gpt_oss",
            dict.fromkeys(("native", "plugin"), "the model has attention sinks"),
            "as llama",
            marks=pytest.mark.slow,
        ),
        pytest.param("cohere", {"native": "", "plugin": ""}, "as llama", marks=pytest.mark.slow),
    ],
)
def test_other_models_are_told_what_the_commands_would_tell(model_type, graphs, why, tmp_path) -> None:
    found = targets(save_random(model_type, tmp_path / "model"))
    exportable, bundle = open_exportable(tmp_path / "model"), tmp_path / "bundle"
    export_bundle(exportable, bundle, ExportOptions(verify=False), QUIET)
    assert found["onnxruntime"].possible
    assert found["onnxruntime-genai"].possible == (bundle / "genai_config.json").exists()
    assert found["onnxruntime-genai"].note == why
    for attention, refusal in graphs.items():
        target = found[f"tensorrt {attention}"]
        assert target.possible == (not refusal)
        if not refusal:
            preflight(lower(bundle / MODEL, attention, 64), attention, bundle)
            continue
        assert refusal in target.note
        with pytest.raises(HeadfoldError) as caught:
            preflight(lower(bundle / MODEL, attention, 64), attention, bundle)
        assert target.note.rpartition("): ")[2] in str(caught.value)
    row = next(row for row in TRIED if row.model_type == model_type)
    assert all(found[f"tensorrt {attention}"].possible for attention in row.tensorrt)
    assert not found["--kv-cache"].possible
    with pytest.raises(HeadfoldError) as caught:
        export_bundle(exportable, tmp_path / "other", ExportOptions(cache=CacheCalibration("int8")), QUIET)
    assert str(caught.value).endswith(found["--kv-cache"].note)
    assert found["--weights"].possible
    assert found["--weights"].note == "int8, int4, mixed, w8a8, fp8, nvfp4"


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_convert_uptrain_and_sweep_refuse_what_has_no_table(model_type, tmp_path) -> None:
    """Inspect gives their own line; where there is a table, they would go on to the next fault."""
    path, out = str(save_random(model_type, tmp_path / "model")), str(tmp_path / "out" / "made")
    (tmp_path / "out").mkdir()
    (tmp_path / "text.txt").write_text("the quick brown fox")
    found = targets(Path(path))
    data = ["--data", str(tmp_path / "text.txt"), "--tokens", "1000"]
    commands = {
        "convert": ["convert", path, "-o", out, "--kv-heads", "1"],
        "uptrain": ["uptrain", path, "-o", out, "--teacher", path, *data, "--cpu"],
        "sweep": ["sweep", path, "-o", out, "--kv-heads", "1", *data, "--cpu"],
    }
    for name, arguments in commands.items():
        result = CliRunner().invoke(main, [*arguments, "-q"])
        assert found[name].possible == (model_type == "llama")
        assert ("no table of model_type" in result.stderr) == (model_type != "llama")
        if model_type == "llama":
            continue
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert line.endswith(f"{path}/config.json: {found[name].note}")
        assert "They take llama, mistral, qwen2, qwen3" in line
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "why"), [("mamba", "mamba has a state beside"), ("bloom", "attends by code of")]
)
def test_a_model_that_can_become_nothing_says_why(model_type, why, tmp_path) -> None:
    save_random(model_type, tmp_path / "model")
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(main, ["inspect", str(tmp_path / "model"), *arguments])
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert why in line


def test_inspect_prints_a_line_for_each(tmp_path) -> None:
    path = save_random("gemma2", tmp_path / "model")
    content = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout)
    assert content["road"] == "transformers"
    expected = [vars(target) for target in targets_of(open_exportable(path))]
    assert content["can_become"] == expected
    shown = " ".join(CliRunner().invoke(main, ["inspect", str(path)]).stdout.split())
    for target in expected:
        assert f"{target['name']} {'yes' if target['possible'] else 'no'} {target['note']}" in shown


def test_no_weight_is_read(toy_checkpoint, tmp_path, monkeypatch) -> None:
    """Nor of a model that transformers loads; their headers are enough."""
    llama, other = open_exportable(toy_checkpoint), open_exportable(save_random("arcee", tmp_path / "model"))
    monkeypatch.setattr(type(llama.checkpoint), "read", None)
    monkeypatch.setattr(Stored, "read", None)
    monkeypatch.setattr(ModelTensors, "read", None)
    for exportable in (llama, other):
        assert {"onnxruntime", "tensorrt native"} <= {t.name for t in targets_of(exportable) if t.possible}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing tensors: model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensors: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "mismatched tensors: model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_make_no_graph(change, why, tmp_path) -> None:
    file = save_random("arcee", tmp_path / "model") / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})
    found = targets(tmp_path / "model")
    assert names(found) == set()
    assert why in found["onnxruntime"].note
    assert found["onnxruntime"].note == found["tensorrt native"].note


def test_quantized_checkpoints_and_adapters_are_what_they_are_of(toy_checkpoint, tmp_path) -> None:
    base, quantized = Path(shutil.copytree(toy_checkpoint, tmp_path / "base")), tmp_path / "gptq"
    shutil.copytree(base, quantized)
    tensors = load_file(base / "model.safetensors")
    parts, _ = gptq(4, 16, True, 2, False)(tensors.pop("model.layers.0.mlp.up_proj.weight"))
    tensors |= {f"model.layers.0.mlp.up_proj{end}": tensor for end, tensor in parts.items()}
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    how = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq_v2"}
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    expected = targets(base)
    for path in (quantized, tmp_path / "adapter"):
        assert targets(path) == expected


def test_an_adapter_whose_base_is_told_is_none_to_commands_that_cannot_be_told(toy_checkpoint, tmp_path) -> None:
    base = Path(shutil.copytree(toy_checkpoint, tmp_path / "base"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    moved = base.rename(tmp_path / "elsewhere")
    found = {t.name: t for t in targets_of(open_exportable(tmp_path / "adapter", base=moved), moved)}
    assert found["--weights"].possible
    assert not any(found[name].possible for name in CHANGES)


@pytest.mark.slow
def test_an_outline_has_a_layer_of_every_kind_and_no_more(tmp_path) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3
    save_random("gemma3_text", tmp_path / "model", num_hidden_layers=7, layer_types=kinds)
    save_random("smollm3", tmp_path / "nope", num_hidden_layers=6, no_rope_layers=[1, 1, 0, 1, 1, 0], layer_types=None)
    for path, count in ((tmp_path / "model", 4), (tmp_path / "nope", 3)):
        whole = open_exportable(path)
        small = outline(whole)
        assert len(small.facts.layers) == count
        graphs = [export_graph(x, x.tensors(torch.float32), torch.float32, 64) for x in (small, whole)]
        ops = [{(node.domain, node.op_type) for node in graph.graph} for graph in graphs]
        assert ops[0] == ops[1]
