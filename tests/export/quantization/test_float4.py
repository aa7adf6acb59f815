"""Bundles of --weights nvfp4: the nearest float4 and GPTQ's, proven, gated, run, and given to TensorRT for GPUs that have it."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from block_models import CONFIG, checkpoint, exported, run
from random_transformers import save_random
from rounded_engines import check_gpus, installed, network_report

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.engine.lowering import lower
from headfold.export.model.rounding import as_rounded, holds, restored, rounded
from headfold.export.parity.exact.rounding import StoredRoundings
from headfold.export.quantization.gptq import Inputs, gptq
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import FLOAT4_VERSION, MODEL, read_manifest

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def bundle(source) -> Path:
    return export(source, source.parent / "nvfp4")


def export(source: Path, output: Path, *options: object) -> Path:
    return exported(source, output, "--weights", "nvfp4", *options)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 1e-2, 1.0, 300.0])
def test_they_are_the_nearest_that_ml_dtypes_knows(size, scales) -> None:
    w = size * torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    w[4, :16] *= 1e-6
    found = rounded(w, "float4", scales)
    assert found.form.block == 16
    steps = 2 * found.scales.numpy()  # of numbers that are not doubled
    unit = np.exp2(np.floor(np.log2(steps.max() / 56)))  # a power of two
    float8 = (steps / unit).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(float8.astype(np.float32) * unit, steps)
    wanted = np.abs(w.numpy().reshape(6, 4, 16)).max(-1) / 6
    if size > 1e-6 or scales == torch.float32:  # float16 has no scale so small
        far = wanted > steps.max() / 400
        assert (np.abs(steps - wanted)[far] <= wanted[far] / 16).all()  # three bits behind the first
    values = (w.numpy().reshape(6, 4, 16) / steps[..., None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(found.values.numpy(), 2 * values.astype(np.float32).reshape(6, 64))
    assert np.array_equal(
        restored(found).numpy(), (values.astype(np.float32) * steps[..., None].astype(np.float32)).reshape(6, 64)
    )
    assert torch.equal(as_rounded(w, "float4", scales), restored(found))
    assert holds(found, restored(found))


def test_ties_go_to_the_number_whose_last_bit_is_zero() -> None:
    w = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0]])
    right = w.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(restored(rounded(w, "float4")).numpy(), right)


def test_gptq_loses_less_than_the_nearest_numbers_do() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    found = gptq(weight, Inputs.of(x.T @ x, 16), "float4")
    assert set(found.values.abs().unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
    wrong = [(x @ (restored(rounding) - weight).T).norm() for rounding in (found, rounded(weight, "float4"))]
    assert wrong[0] < 0.8 * wrong[1]


def test_it_is_proven_and_says_what_it_is(bundle, source) -> None:
    manifest = read_manifest(bundle)
    assert manifest.format_version == FLOAT4_VERSION
    assert manifest.parity["passed"]
    record = json.loads((bundle / "weights.json").read_text())["tensors"]
    assert {(tensor["bits"], tensor["block_size"]) for name, tensor in record.items() if "layers" in name} == {
        ("float4", 16)
    }
    assert record["model.embed_tokens.weight"]["bits"] == 8
    code, output = run("verify", bundle, "--against", source, "-q")
    assert code == 0, output
    code, output = run("inspect", bundle)
    assert "in float4_e2m1 in blocks of 16, kept in a byte each" in " ".join(output.split())


def test_the_nearest_numbers_are_a_rule_that_the_proof_repeats(source, tmp_path) -> None:
    manifest = read_manifest(export(source, tmp_path / "nvfp4", "--rounding", "nearest"))
    assert manifest.parity["passed"]
    record = json.loads((tmp_path / "nvfp4" / "weights.json").read_text())["tensors"]
    assert {tensor["method"] for tensor in record.values()} == {"nearest"}


@pytest.mark.slow
def test_a_model_with_joined_products_and_a_head_of_its_own_in_float16(tmp_path) -> None:
    config = replace(CONFIG, tie_word_embeddings=False, model_type="qwen2", qkv_bias=True)
    save_hf(tmp_path / "source", checkpoint(config), torch.float32)
    bundle = export(tmp_path / "source", tmp_path / "nvfp4", "--dtype", "float16", "--max-kl", "9")
    assert run("verify", bundle, "--against", tmp_path / "source", "-q")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_a_model_of_transformers(model_type, tmp_path) -> None:
    save_random(model_type, tmp_path / "model")
    manifest = read_manifest(export(tmp_path / "model", tmp_path / "nvfp4", "--max-kl", "9"))
    assert (manifest.road, manifest.parity["passed"]) == ("transformers", True)


def test_tensorrt_is_given_the_same_weights_in_four_bits(bundle, source) -> None:
    master, lowered = ir.load(bundle / MODEL), lower(bundle / MODEL, "native", 64)
    checkpoint, values = open_checkpoint(source), lowered.graph.initializers
    packed = next(x for name, x in values.items() if name.startswith(f"{UP}.float4") and name.endswith(".packed"))
    assert packed.dtype == ir.DataType.FLOAT4E2M1
    form = rounded(checkpoint.read(UP), "float4", torch.float16).form
    stored = StoredRoundings(master, {UP: replace(form, narrow=True)}, checkpoint.shapes(), bundle / MODEL)
    exact = restored(stored[UP])
    dequantize = next(node for node, _ in packed.uses())
    float8, unit = dequantize.inputs[1].producer().inputs
    steps = float8.const_value.numpy().astype(np.float32) * unit.const_value.numpy()
    numbers = packed.const_value.numpy().astype(np.float32).reshape(*steps.shape, 16)
    assert np.array_equal((numbers * steps[..., None]).reshape(exact.shape), exact.numpy())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("float4", lambda x: x.fill(128 + 5), "holds numbers that no float4 is"),
        ("float4.scales", lambda x: np.multiply(x, 1.01, out=x), "holds scales that no float8 holds"),
    ],
)
def test_what_is_no_float4_is_refused_in_a_line(part, change, message, bundle, tmp_path) -> None:
    model = ir.load(bundle / MODEL)
    value = next(x for name, x in model.graph.initializers.items() if name.startswith(UP) and name.endswith(part))
    changed = value.const_value.numpy().copy()
    change(changed)
    value.const_value = ir.tensor(changed)
    ir.save(model, tmp_path / MODEL, external_data="model.onnx.data")
    with pytest.raises(BuildError, match=message):
        lower(tmp_path / MODEL, "native", 64)


@installed
@pytest.mark.parametrize("attention", ["native", pytest.param("plugin", marks=pytest.mark.slow)])
def test_the_parsed_network_agrees_with_pytorch(attention, bundle, source) -> None:
    report = network_report(bundle, source, attention)
    assert report.passed, report.failure()


@installed
def test_engines_are_for_gpus_that_have_float4(bundle, source, tmp_path) -> None:
    check_gpus("float4", 89, 120, "int4", bundle, source, tmp_path)
