"""Quantized checkpoints and adapters through both roads: proven bundles of the weights that they stand for, and the proof says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_weights import Stored, float8, gptq, mxfp4
from random_transformers import random_model, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.export.bundle.inspection import inspect_path
from headfold.export.bundle.pipeline import ExportOptions, ExportResult, export_bundle
from headfold.export.cli import main
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.runtime.errors import HeadfoldError

QUIET = Reporter(quiet=True)


def export(directory: Path, output: Path, via: Any = None) -> ExportResult:
    return export_bundle(open_exportable(directory, via), output, ExportOptions(decode_steps=4), QUIET)


def quantize(
    directory: Path, settings: dict[str, Any], ends: tuple[str, ...], store: Callable[[Tensor], Stored]
) -> dict[str, Tensor]:
    """Those tensors of a directory whose names end so; all of them as they then are."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith(ends)]:
        parts, expected[name] = store(tensors.pop(name))
        base = name.removesuffix(".weight")
        tensors |= {base + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


def test_gptq_by_our_own_table(toy_checkpoint, tmp_path) -> None:
    shutil.copytree(toy_checkpoint, tmp_path / "q")
    quantize(tmp_path / "q", GPTQ, ("_proj.weight",), gptq(4, 16, False, 1, False))
    report = export(tmp_path / "q", tmp_path / "bundle").parity
    assert report is not None
    assert report.passed
    assert "LlamaForCausalLM of transformers" in report.oracle
    assert report.oracle.endswith("weights dequantized (GPTQ 4 bits, groups of 16) by headfold")


@pytest.mark.slow
def test_mxfp4_by_way_of_transformers(tmp_path) -> None:
    path = save_random("gpt_oss", tmp_path / "model", intermediate_size=64)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    expected = quantize(path, settings, ("experts.gate_up_proj", "experts.down_proj"), mxfp4)
    assert inspect_path(path)["quantization"] == "mxfp4, blocks of 32"
    read = open_exportable(path).tensors(torch.float32)
    for name in read.shapes():
        assert torch.equal(read.read(name), expected[name]), name
    report = export(path, tmp_path / "bundle").parity
    assert report is not None
    assert report.passed
    assert report.oracle.endswith("weights dequantized (mxfp4, blocks of 32) by headfold")


def test_experts_of_8_bit_floats_are_joined_by_transformers(tmp_path) -> None:
    path = save_random("qwen3_moe", tmp_path / "model")
    settings = {"quant_method": "fp8", "weight_block_size": [32, 20], "activation_scheme": "dynamic"}
    expected = quantize(path, settings, ("_proj.weight",), float8((32, 20)))
    read = open_exportable(path).tensors(torch.float32)
    experts = [expected[f"model.layers.1.mlp.experts.{i}.down_proj.weight"] for i in range(6)]
    assert torch.equal(read.read("model.layers.1.mlp.experts.down_proj"), torch.stack(experts))
    assert torch.equal(
        read.read("model.layers.2.self_attn.q_proj.weight"), expected["model.layers.2.self_attn.q_proj.weight"]
    )
    assert export(path, tmp_path / "bundle").parity.passed


def make_adapter(model_type: str, base: Path, directory: Path) -> dict[str, Tensor]:
    """Saved by peft; the tensors that peft merges."""
    torch.manual_seed(1)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(random_model(model_type), settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    return dict(PeftModel.from_pretrained(random_model(model_type), directory).merge_and_unload().state_dict())


@pytest.mark.slow
def test_an_adapter_by_way_of_transformers(tmp_path) -> None:
    base = save_random("gemma3_text", tmp_path / "base")
    merged = make_adapter("gemma3_text", base, tmp_path / "adapter")
    read = open_exportable(tmp_path / "adapter").tensors(torch.float32)
    for name in read.shapes():
        torch.testing.assert_close(read.read(name), merged[name], rtol=1e-5, atol=1e-6)
    report = export(tmp_path / "adapter", tmp_path / "bundle").parity
    assert report is not None
    assert report.passed
    assert report.oracle.endswith("weights merged with its adapter by headfold")


def test_an_adapter_of_our_own_table_over_a_base_that_is_named(tmp_path) -> None:
    base = save_random("llama", tmp_path / "base")
    make_adapter("llama", tmp_path / "nowhere/of/that/name", tmp_path / "adapter")
    adapter, bundle, options = str(tmp_path / "adapter"), str(tmp_path / "bundle"), ["--decode-steps", "2", "-q"]
    run = CliRunner().invoke
    assert run(main, ["export", adapter, "-o", bundle, "--base", str(base), *options]).exit_code == 0
    assert run(main, ["verify", bundle, "--against", adapter, "--base", str(base), *options]).exit_code == 0
    assert run(main, ["verify", bundle, "--against", str(base), *options]).exit_code == 1
    assert json.loads(run(main, ["inspect", adapter, "--base", str(base), "--json"]).stdout)["road"] == "headfold"
    assert load_file(base / "model.safetensors")  # as it was


def test_a_merged_model_that_still_has_its_adapters_configuration(toy_checkpoint, tmp_path) -> None:
    shutil.copytree(toy_checkpoint, tmp_path / "merged")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "nowhere", "task_type": "CAUSAL_LM"}
    (tmp_path / "merged" / "adapter_config.json").write_text(json.dumps(settings))
    oracle = open_exportable(tmp_path / "merged").oracle(torch.float32, 64)
    assert oracle.name.endswith("weights read by headfold")


def damage(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = load_file(path / "model.safetensors")
        content[name] = change(content[name]).contiguous()
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})

    return edit


UP = "model.layers.0.mlp.up_proj"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a group that is not there": (damage(f"{UP}.g_idx", lambda x: x + 99), "g_idx names groups 99 to 104, of 6"),
    "fewer rows": (damage(f"{UP}.scales", lambda x: x[:, :8]), f"{UP}.scales is F16 [6, 8] instead of"),
    "scales of infinity": (damage(f"{UP}.scales", lambda x: x / 0), f"{UP}.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_on_the_road_of_transformers_is_one_line_and_leaves_nothing(case, tmp_path) -> None:
    change, message = BAD[case]
    path = save_random("arcee", tmp_path / "model")
    quantize(path, GPTQ, ("_proj.weight",), gptq(4, 16, True, 1, False))
    change(path)
    with pytest.raises(HeadfoldError) as caught:
        export(path, tmp_path / "bundle")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
