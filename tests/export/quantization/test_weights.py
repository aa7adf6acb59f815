"""Bundles with weights of four and eight bits: proven exact, measured, gated, and run."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from block_models import CONFIG, checkpoint, rounding, run

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.graph.bodies import use_quantized_bodies, use_standard_body
from headfold.export.model.rounding import bits_of
from headfold.export.quantization import forced
from headfold.export.quantization.cost import reference, weights_cost
from headfold.export.quantization.products import set_level_in_file
from headfold.runtime import load
from headfold.runtime.manifest import read_manifest


def shapes_of(source: Path) -> Mapping[str, tuple[int, ...]]:
    return open_checkpoint(source).shapes()


def test_the_manifest_says_what_was_done_and_what_it_cost(bundle, source) -> None:
    manifest = read_manifest(bundle)
    assert manifest.format_version == 5
    assert manifest.parity["passed"]
    spec = manifest.weights
    assert (spec.scheme, spec.block_size) == ("int4", 32)
    assert 0 < spec.cost.kl < spec.cost.kl_99
    assert spec.cost.kl < 0.1
    tensors = json.loads((bundle / "weights.json").read_text())["tensors"]
    assert {name: cost["bits"] for name, cost in tensors.items()} == bits_of(shapes_of(source), "int4")
    assert all(0 < cost["relative_squared_error"] < (1e-4 if cost["bits"] == 8 else 3e-2) for cost in tensors.values())
    code, output = run("inspect", bundle, "--json")
    assert code == 0
    assert json.loads(output)["weights_cost"]["kl"] == spec.cost.kl


@pytest.mark.parametrize("scheme", ["int8", "mixed", "w8a8"])
@pytest.mark.parametrize("factor", [1.0, 1e-4, 1e7])
def test_scales_take_two_bytes_where_float16_holds_them(scheme, factor, tmp_path) -> None:
    """Weights are so much larger, and those behind them smaller, that the model computes the same."""
    original = checkpoint(replace(CONFIG, tie_word_embeddings=False))
    tensors = {name: original.read(name).clone() for name in original}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= factor
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] /= factor
    save_hf(tmp_path / "source", MemoryCheckpoint(Path("memory"), original.config, tensors), torch.float32)
    options = ("--weights", scheme, *(("--bits", "6", "--max-kl", "9") if scheme == "mixed" else ()), "-q")
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "bundle", *options)
    assert code == 0, output
    values = ir.load(tmp_path / "bundle" / "model.onnx").graph.initializers
    wide = {name for name, x in values.items() if name.endswith(".scales") and x.dtype != ir.DataType.FLOAT16}
    layers = {name for name in values if name.endswith(".scales") and "layers" in name}
    odd = [name for name, size in {"up_proj": factor, "down_proj": 1 / factor}.items() if not 2**-8 < size < 2**17]
    assert wide == (layers if scheme == "w8a8" else {name for name in layers if any(x in name for x in odd)})
    assert read_manifest(tmp_path / "bundle").weights.cost.kl < (0.1 if scheme == "mixed" else 0.02)


def test_a_tied_head_and_embedding_share_one_matrix(bundle) -> None:
    values = ir.load(bundle / "model.onnx").graph.initializers
    sizes = {name: value.const_value.size for name, value in values.items() if name.startswith("model.embed_tokens")}
    assert sizes == {"model.embed_tokens.weight.int8": 160 * 64, "model.embed_tokens.weight.int8.scales": 160 * 2}
    weights = 4 * sum(np.prod(shape) for shape in open_checkpoint(bundle.parent / "source").shapes().values())
    assert (bundle / "model.onnx.data").stat().st_size < weights / 3


def test_nothing_is_reshaped_or_unpacked_for_a_matrix_of_eight_bits(bundle) -> None:
    model = ir.load(bundle / "model.onnx")
    lookup = {node.op_type for node in model.functions["headfold", "QuantizedGather", ""]}
    assert "Gather" in lookup
    assert not {"BitShift", "BitwiseAnd"} & lookup
    assert not any(node.op_type == "Reshape" for node in model.graph)


@pytest.fixture(scope="module")
def exact(bundle) -> Path:
    """The bundle with float32 inputs of its products."""
    path = bundle.parent / "exact"
    shutil.copytree(bundle, path)
    set_level_in_file(path / "model.onnx", 1)
    return path


def test_onnx_runtime_decodes_as_pytorch_with_the_rounded_weights_does(exact, source) -> None:
    decoder = load_decoder(rounding(source))
    backend, ids = load(exact, check=False).backend, np.arange(3, 12)
    cache = backend.new_cache(1, 32)
    logits = backend.prefill(cache, 0, ids)
    for token in (3, 1, 4):
        expected = decoder(torch.tensor(ids)[None]).logits[0, -1]
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        ids = np.append(ids, token)
        logits = backend.decode(cache, np.array([token]), np.ones(1, np.bool_))[0]


@pytest.mark.parametrize("largest", [forced.LARGE, 0], ids=["whole", "layer by layer"])
def test_the_cost_is_that_of_the_rounded_weights_in_pytorch(exact, source, largest, monkeypatch) -> None:
    monkeypatch.setattr(forced, "LARGE", largest)
    assert isinstance(forced.open_forced(exact, read_manifest(exact)), forced._Whole) == (largest > 0)
    tokens, original = torch.arange(160).view(5, 32), open_checkpoint(source)
    before = reference(load_decoder(original), tokens)
    cost = weights_cost(exact, read_manifest(exact), before)
    decoder, ids = load_decoder(rounding(source)), tokens[:, :16]
    for _ in range(16):
        ids = torch.cat((ids, decoder(ids, last_only=True).logits.argmax(-1)), 1)
    equal = np.cumprod(ids[:, 16:].numpy() == before.greedy, 1)
    assert cost.greedy_agreement == pytest.approx(equal.sum(1).mean())
    after = decoder(tokens).logits.double().log_softmax(-1)
    exact = torch.from_numpy(before.logits).double().log_softmax(-1)
    kl = (exact.exp() * (exact - after)).sum(-1)
    losses = [-x[:, :-1].gather(2, tokens[:, 1:, None]).mean() for x in (exact, after)]
    assert cost.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert cost.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert cost.top1 == pytest.approx((exact.argmax(-1) == after.argmax(-1)).double().mean().item(), abs=0.01)
    assert (cost.perplexity_before, cost.perplexity) == pytest.approx([np.exp(x.item()) for x in losses], rel=1e-3)


def test_standard_ops_compute_the_same(exact, tmp_path) -> None:
    model = ir.load(exact / "model.onnx")
    use_standard_body(model)
    use_quantized_bodies(model, standard=True)
    ids = np.arange(3, 12)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {value.name: np.zeros((1, 2, 16, 16), np.float32) for value in model.graph.inputs[2:]}
    ir.save(model, tmp_path / "standard.onnx", external_data="standard.onnx.data")
    assert {domain for f in model.functions.values() for domain in f.opset_imports} == {""}
    paths = (exact / "model.onnx", tmp_path / "standard.onnx")
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
    kernel, standard = (session.run(["logits"], feeds)[0] for session in sessions)
    np.testing.assert_allclose(standard, kernel, atol=1e-4)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False, "qkv_bias": True, "model_type": "qwen2"}])
def test_eight_bits_with_biases_and_a_head_of_its_own_and_a_cache_of_what_they_make(config, tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(replace(CONFIG, **config)), torch.float32)
    options = ("--weights", "int8", "--kv-cache", "int8", "--calibration-tokens", 256, "-q")
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "int8", *options)
    assert code == 0, output
    assert read_manifest(tmp_path / "int8").weights.cost.kl < 0.01
    code, output = run("verify", tmp_path / "int8", "--against", tmp_path / "source", "-q")
    assert code == 0, output


def test_mixed_weights_have_the_bits_that_were_asked_for_where_they_are_worth_most(mixed, bundle, source) -> None:
    tensors, shapes = json.loads((mixed / "weights.json").read_text())["tensors"], open_checkpoint(source).shapes()
    sizes = {name: np.prod(shapes[name]) for name in tensors}
    wide = {name: tensor["wide_rows"] * shapes[name][1] for name, tensor in tensors.items()}
    average = sum(sizes[name] * x["bits"] + 4 * wide[name] for name, x in tensors.items()) / sum(sizes.values())
    spec = read_manifest(mixed).weights
    assert spec.bits == average
    assert 5.5 < average <= 6
    assert {tensor["method"] for tensor in tensors.values() if tensor["bits"] == 4} == {"gptq"}
    assert {tensor["method"] for tensor in tensors.values() if tensor["bits"] == 8} == {"nearest"}
    gains = {name: tensor["kl"] for name, tensor in tensors.items() if tensor["kl"] is not None}
    assert all(gain > 0 for gain in gains.values())
    assert max(gains, key=gains.__getitem__) in {name for name, tensor in tensors.items() if tensor["bits"] == 8}
    assert spec.cost.kl < read_manifest(bundle).weights.cost.kl
    code, output = run("verify", mixed, "--against", source, "-q")
    assert code == 0, output


def test_all_weights_can_have_four_bits_the_head_by_gptq_too(source, tmp_path) -> None:
    code, output = run(
        "export", source, "-o", tmp_path / "out", "--weights", "mixed", "--bits", "4", "--max-kl", "9", "-q"
    )
    assert code == 0, output
    tensors = json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"]
    assert {(tensor["bits"], tensor["method"]) for tensor in tensors.values()} == {(4, "gptq")}
    assert read_manifest(tmp_path / "out").weights.bits == 4
    code, output = run("verify", tmp_path / "out", "--against", source, "-q")
    assert code == 0, output
