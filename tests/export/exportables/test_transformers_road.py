"""The road of transformers: tiny random models come out proven against its own eager attention; others are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from random_transformers import random_model, save_random
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headfold.export.bundle.pipeline import ExportOptions, ExportResult, export_bundle
from headfold.export.engine.options import BuildOptions, check_options
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.runtime import load
from headfold.runtime.errors import ConfigError, HeadfoldError
from headfold.runtime.manifest import read_manifest

QUIET = Reporter(quiet=True)


def export(directory: Path, output: Path, **options) -> ExportResult:
    source = open_exportable(directory, "transformers")
    return export_bundle(source, output, ExportOptions(decode_steps=4, **options), QUIET)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "smollm3", "phimoe", "laguna", "granite_swa")]


@pytest.mark.parametrize("model_type", ["gemma3_text", *SLOW])
def test_is_proven_and_generates_what_transformers_does(model_type, tmp_path) -> None:
    result = export(save_random(model_type, tmp_path / "model"), tmp_path / "bundle")
    assert result.parity is not None
    assert result.parity.passed
    assert result.manifest.road == "transformers"
    model = load(tmp_path / "bundle")
    prompt = np.random.default_rng(0).integers(3, 300, 21)
    cache = model.backend.new_cache(1, 32)
    logits = model.backend.prefill(cache, 0, prompt)
    expected = random_model(model_type)(torch.tensor(prompt)[None]).logits[0, -1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


OUTSIDE = {  # of the tables of headfold's own families
    "llama": {"partial_rotary_factor": 0.5},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
}


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def test_what_a_table_has_no_place_for_takes_this_road_by_itself_and_says_so(
    model_type, tmp_path, capsys, monkeypatch
) -> None:
    path = save_random(model_type, tmp_path / "model", **OUTSIDE[model_type])
    source = open_exportable(path, reporter=Reporter())
    assert source.road == "transformers"
    assert f"{model_type}: by way of transformers, for partial_rotary_factor is 0." in capsys.readouterr().err
    result = export_bundle(source, tmp_path / "bundle", ExportOptions(decode_steps=4), QUIET)
    assert result.parity is not None
    assert result.parity.passed
    assert_generates_what_transformers_does(path, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="which transformers ignores in this family"):
        open_exportable(path, "headfold")
    monkeypatch.setattr("headfold.export.exportables.opening.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match='Install it: pip install "headfold\\[transformers\\]"') as caught:
        open_exportable(path)
    assert "partial_rotary_factor" in str(caught.value)


def test_an_activation_that_no_table_has_takes_this_road(tmp_path) -> None:
    path = save_random("llama", tmp_path / "model", hidden_act="relu2")
    assert export_bundle(open_exportable(path), tmp_path / "bundle", ExportOptions(decode_steps=1), QUIET).parity.passed
    assert_generates_what_transformers_does(path, tmp_path / "bundle")


def test_a_mistral_with_layer_types_generates_what_transformers_does(tmp_path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    path = save_random("ministral", tmp_path / "model", layer_types=kinds, sliding_window=9)
    config(model_type="mistral")(path)
    source = open_exportable(path)
    assert source.road == "headfold"
    result = export_bundle(source, tmp_path / "bundle", ExportOptions(decode_steps=4), QUIET)
    assert result.parity is not None
    assert result.parity.passed
    assert "MinistralForCausalLM of transformers" in result.parity.oracle
    assert_generates_what_transformers_does(path, tmp_path / "bundle")


def assert_generates_what_transformers_does(checkpoint: Path, bundle: Path) -> None:
    """Loaded by its own code, with its own cache."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    prompt = np.random.default_rng(0).integers(3, 300, 30).tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, 30:]
    assert load(bundle).generate(prompt, max_new_tokens=8, ignore_eos=True).token_ids == expected.tolist()


def test_layers_are_what_the_model_does(tmp_path) -> None:
    facts = open_exportable(save_random("gemma2", tmp_path / "model")).facts
    assert [layer.window for layer in facts.layers] == [9, -1, 9]
    assert {(layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) for layer in facts.layers} == {
        (6, 2, 32)
    }
    assert {(layer.scale, layer.softcap) for layer in facts.layers} == {(24**-0.5, 50.0)}
    assert (facts.vocab_size, facts.capacity, facts.eos_token_id) == (331, 256, (2,))


def test_heads_may_differ_from_layer_to_layer(tmp_path) -> None:
    """Head sizes and K/V heads, in manifest, cache and runtime; a TensorRT session has one shape only, and building says so."""
    result = export(save_random("gemma4_text", tmp_path / "model"), tmp_path / "bundle")
    assert result.parity is not None
    assert result.parity.passed
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.cache.shapes == [(2, 32), (2, 32), (3, 64)]
    assert not (tmp_path / "bundle" / "genai_config.json").exists()  # which has one shape only
    backend = load(tmp_path / "bundle").backend
    prompt = np.random.default_rng(0).integers(3, 300, 21)
    logits = backend.prefill(backend.new_cache(1, 32), 0, prompt)
    expected = random_model("gemma4_text")(torch.tensor(prompt)[None]).logits[0, -1]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    with pytest.raises(HeadfoldError, match="caches of different shapes"):
        check_options(BuildOptions(compute_capabilities=(89,)), tmp_path / "bundle", manifest)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_16_bits(dtype, tmp_path) -> None:
    result = export(save_random("gemma2", tmp_path / "model"), tmp_path / "bundle", dtype=dtype)
    assert result.parity is not None
    assert result.parity.passed


def config(**changes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = load_file(path / "model.safetensors")
        change(content)
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for one in changes:
            one(path)

    return change


def to_pickle(path: Path) -> None:
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


UP = "model.layers.0.mlp.up_proj.weight"
BAD = {
    "a state beside keys and values": (config(model_type="mamba"), "mamba has a state beside keys and values"),
    "ALiBi": (config(model_type="bloom"), "bloom attends by code of its own (with ALiBi?)"),
    "values of another size": (config(model_type="deepseek_v3"), "deepseek_v3 does not run with headfold's cache"),
    "unknown": (config(model_type="llamax"), "transformers cannot read its configuration"),
    "a text model's configuration of another type": (config(text_config=5), "configuration of its text model is none"),
    "quantized": (
        both(
            config(quantization_config={"quant_method": "hqq"}),
            tensors(lambda t: t.update(W_q=torch.ones(2, dtype=torch.uint8))),
        ),
        "its weights are quantized (hqq)",
    ),
    "a missing tensor": (tensors(lambda t: t.pop(UP)), f"missing tensors: {UP}"),
    "architectures of another type": (
        both(config(architectures=[{"x": 1}, 3]), tensors(lambda t: t.pop(UP))),
        f"missing tensors: {UP}",
    ),
    "a tensor of another model": (tensors(lambda t: t.update(extra=torch.ones(2))), "unexpected tensors: extra"),
    "a tensor of another shape": (tensors(lambda t: t.update({UP: t[UP][:8].clone()})), f"mismatched tensors: {UP}"),
    "NaN": (tensors(lambda t: t[UP].fill_(float("nan"))), f"tensor {UP} holds NaN or infinity"),
    "more layers than tensors": (config(num_hidden_layers=1000), "it has 1000 layers, and"),
    "more layers than memory": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "more experts than memory": (config(moe={"num_experts": 2.0**40}), "num_experts is 1099511627776"),
    "more parameters than there are": (config(vocab_size=10**9), "parameters, and its files 290,016"),
    "a size below zero": (config(intermediate_size=-2), "no arcee can be made of its configuration"),
    "a pickle": (to_pickle, "pickles are never loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path) -> None:
    change, message = BAD[case]
    change(save_random("arcee", tmp_path / "model"))
    with pytest.raises(HeadfoldError) as caught:
        export(tmp_path / "model", tmp_path / "bundle", verify=False)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_no_forward_pass_reads_may_lie_there(tmp_path) -> None:
    extra = {"v_head.summary.weight": torch.ones(1, 4), "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4)}
    tensors(lambda t: t.update(extra))(save_random("arcee", tmp_path / "model"))
    export(tmp_path / "model", tmp_path / "bundle", verify=False)
