"""Bundles of --weights fp8: the nearest float8, proven, gated, run, and given to TensorRT for GPUs that have it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import block_models
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from block_models import checkpoint, exported, run
from quantized_models import in_directory
from quantized_weights import float8
from random_transformers import save_random
from rounded_engines import check_gpus, installed, network_report

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.engine.lowering import lower
from headfold.export.exportables.own import OwnModel
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import as_rounded, holds, restored, rounded
from headfold.export.parity import runners
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.products import set_level_in_file
from headfold.runtime import load
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import FLOAT8_VERSION, MODEL, read_manifest

CONFIG = replace(block_models.CONFIG, intermediate_size=80)  # no whole blocks, and none are needed
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "source"
    save_hf(path, checkpoint(CONFIG), torch.float32)
    return path


@pytest.fixture(scope="module")
def bundle(source) -> Path:
    return export(source, source.parent / "fp8")


def export(source: Path, output: Path, *options: object) -> Path:
    return exported(source, output, "--weights", "fp8", *options)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
def test_they_are_the_nearest_that_ml_dtypes_knows(scales) -> None:
    w = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    found = rounded(w, "float8", scales)
    step = np.maximum(w.numpy().astype(np.float64), -w.numpy()).max(1) / 448
    step = step.astype(np.float32).astype(str(scales).removeprefix("torch.")).astype(np.float32)
    step[3] = 1
    assert np.array_equal(found.scales[:, 0].numpy(), step)
    right = np.clip(w.numpy() / step[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(found.values.view(torch.uint8).numpy(), right.view(np.uint8))
    assert np.array_equal(restored(found).numpy(), right.astype(np.float32) * step[:, None])
    assert torch.equal(as_rounded(w, "float8", scales), restored(found))
    assert holds(found, restored(found))
    assert (restored(found) - w).abs().max() <= w.abs().max() / 16  # three bits behind the first


def test_it_is_proven_and_says_what_it_is(bundle, source) -> None:
    manifest = read_manifest(bundle)
    assert manifest.format_version == FLOAT8_VERSION
    assert manifest.parity["passed"]
    assert (manifest.weights.scheme, manifest.weights.bits) == ("fp8", 8)
    assert 0 < manifest.weights.cost.kl < 0.05
    values = ir.load(bundle / MODEL).graph.initializers
    assert values[f"{UP}.float8"].dtype == ir.DataType.FLOAT8E4M3FN
    record = json.loads((bundle / "weights.json").read_text())["tensors"]
    assert {tensor["bits"] for name, tensor in record.items() if "layers" in name} == {"float8"}
    assert record["model.embed_tokens.weight"]["bits"] == 8
    code, output = run("verify", bundle, "--against", source, "-q")
    assert code == 0, output
    code, output = run("inspect", bundle)
    assert "in float8_e4m3fn with a scale for each output" in " ".join(output.split())


def test_it_computes_with_them(bundle, source, tmp_path) -> None:
    original = open_checkpoint(source)
    decoder = Decoder(original.config).requires_grad_(False)
    for name, weight in decoder.named_parameters():
        width = "float8" if "layers" in name else 8
        exact = original.read(name)
        scales = torch.float32 if "layers" in name else torch.float16
        weight.copy_(as_rounded(exact, width, scales) if exact.dim() == 2 else exact)
    shutil.copytree(bundle, tmp_path / "exact")
    set_level_in_file(tmp_path / "exact" / MODEL, 1)
    backend, ids = load(tmp_path / "exact", check=False).backend, np.arange(3, 12)
    logits = backend.prefill(backend.new_cache(1, 32), 0, ids)
    np.testing.assert_allclose(logits, decoder(torch.tensor(ids)[None]).logits[0, -1], atol=1e-4)


@pytest.mark.slow
def test_a_model_with_joined_products_and_a_head_of_its_own_in_float16(tmp_path) -> None:
    config = replace(CONFIG, tie_word_embeddings=False, model_type="qwen2", qkv_bias=True)
    save_hf(tmp_path / "source", checkpoint(config), torch.float32)
    bundle = export(tmp_path / "source", tmp_path / "fp8", "--dtype", "float16", "--kv-cache", "int8")
    assert run("verify", bundle, "--against", tmp_path / "source", "-q")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_a_model_of_transformers(model_type, tmp_path) -> None:
    save_random(model_type, tmp_path / "model")
    manifest = read_manifest(export(tmp_path / "model", tmp_path / "fp8", "--max-kl", "9"))
    assert (manifest.road, manifest.parity["passed"]) == ("transformers", True)


@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_a_large_one_is_never_wide_as_a_whole(scheme, source, tmp_path, monkeypatch) -> None:
    """Neither when it is opened nor while it runs: what becomes floats waits for what it multiplies."""
    for name in ("parity.runners._MAPPED", "quantization.forced.LARGE"):
        monkeypatch.setattr(f"headfold.export.{name}", 0)
    opened, open_parts = [], runners.open_parts

    def seen(models, path, options, fold):
        models = [*models]
        opened.append((fold, options.enable_cpu_mem_arena, [onnx.load_from_string(model) for model in models]))
        return open_parts(models, path, options, fold)

    monkeypatch.setattr(runners, "open_parts", seen)
    exported(source, tmp_path / "out", "--weights", scheme)
    assert {(fold, arena) for fold, arena, _ in opened} == {(False, False)}
    for function in (f for *_, models in opened for model in models for f in model.functions):
        if function.name in ("Float8MatMul", "RoundedMatMul"):
            makers = {name: node for node in function.node for name in node.output}
            wide = next(node for node in function.node if node.op_type == "CastLike")
            shape = makers[makers[wide.input[0]].input[1]]
            assert any(makers[part].input[0] == "x" for part in shape.input if part in makers and makers[part].input)


def test_a_checkpoint_of_float8_keeps_its_numbers(tmp_path) -> None:
    source = in_directory({"quant_method": "fp8", "activation_scheme": "static"}, float8(None))(tmp_path)
    manifest = read_manifest(export(source, tmp_path / "fp8"))
    assert manifest.parity["passed"]
    assert manifest.weights.kept == 7
    assert manifest.weights.cost.kl < 1e-3  # embedding and head alone, in eight bits
    assert run("verify", tmp_path / "fp8", "--against", source, "-q")[0] == 0


def test_a_wrong_scale_is_seen(bundle, source, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path / "fp8")
    model = ir.load(bundle / MODEL)
    scales = next(x for name, x in model.graph.initializers.items() if name.startswith(f"{UP}.float8.scales"))
    changed = scales.const_value.numpy().copy()
    changed[3] *= 1.01
    scales.const_value = ir.tensor(changed)
    (tmp_path / "fp8" / MODEL).unlink()
    (tmp_path / "fp8" / "model.onnx.data").unlink()
    ir.save(model, tmp_path / "fp8" / MODEL, external_data="model.onnx.data")
    exportable, manifest = OwnModel(open_checkpoint(source)), read_manifest(bundle)
    report = verify_bundle(tmp_path / "fp8", exportable, manifest, 4, Reporter(quiet=True))
    assert "weights, bit for bit" in [check.name for check in report.checks if not check.passed]


def test_more_than_the_parser_takes_is_refused_in_a_line(bundle, monkeypatch) -> None:
    """Of the layers' weights alone: those of the embedding, in int8, are fewer."""
    values = ir.load(bundle / MODEL).graph.initializers
    whole = sum(x.const_value.nbytes for x in values.values() if x.dtype == ir.DataType.FLOAT8E4M3FN)
    monkeypatch.setattr("headfold.export.engine.lowering._MESSAGE", whole)
    with pytest.raises(BuildError, match="bytes of rounded weights are too many for TensorRT's parser"):
        lower(bundle / MODEL, "native", 64)


@installed
@pytest.mark.parametrize("attention", ["native", pytest.param("plugin", marks=pytest.mark.slow)])
def test_the_parsed_network_agrees_with_pytorch(attention, bundle, source) -> None:
    report = network_report(bundle, source, attention)
    assert report.passed, report.failure()


@installed
def test_engines_are_for_gpus_that_have_float8(bundle, source, tmp_path) -> None:
    check_gpus("float8", 86, 89, "int8", bundle, source, tmp_path)
