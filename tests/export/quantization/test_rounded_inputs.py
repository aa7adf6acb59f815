"""Bundles of --weights w8a8: proven with their inputs as they are, gated with rounded ones, run by whatever runs ONNX."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import block_models
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from block_models import run

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.engine.lowering import lower
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounding_record import read_record
from headfold.export.graph.bodies import use_quantized_bodies, use_standard_body
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import restored, rounded
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import reference, weights_cost
from headfold.runtime import load
from headfold.runtime.errors import BuildError, BundleError
from headfold.runtime.manifest import read_manifest

CONFIG = replace(block_models.CONFIG, intermediate_size=80)  # no whole blocks, and none are needed
UP = "model.layers.1.mlp.up_proj.weight"


def save_source(path: Path, config: ModelConfig = CONFIG) -> Path:
    """Random weights, one input of each product thirty times as large as the others."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.02 if "norm" in name else 0.2)
    decoder.model.embed_tokens.weight /= 2
    for layer in decoder.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for weight, readers in (
            (layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj.weight, (mlp.down_proj,)),
        ):
            weight[7] *= 30
            for reader in readers:
                reader.weight[:, 7] /= 30
    save_hf(path, MemoryCheckpoint(Path("memory"), config, decoder.state_dict()), torch.float32)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("w8a8") / "source")


@pytest.fixture(scope="module")
def bundle(source) -> Path:
    path = source.parent / "w8a8"
    code, output = run("export", source, "-o", path, "--weights", "w8a8", "-q")
    assert code == 0, output
    return path


def test_manifest_and_record_say_what_was_done_and_what_it_cost(bundle, source) -> None:
    manifest, original = read_manifest(bundle), open_checkpoint(source)
    assert manifest.format_version == 6
    assert manifest.parity["passed"]
    assert manifest.weights.scheme == "w8a8"
    assert 0 < manifest.weights.cost.kl < 0.1
    record = read_record(bundle / "weights.json", original.shapes(), original.config)
    assert {tensor.bits for name, tensor in record.tensors.items() if "layers" in name} == {7}
    assert record.tensors["model.embed_tokens.weight"].bits == 8
    assert record.smoothing[UP][7] > 1
    code, output = run("inspect", bundle, "--json")
    assert code == 0
    assert "seven bits with a scale for each output" in json.loads(output)["weights"]


def test_the_graph_has_products_of_integers_that_no_cpu_saturates(bundle) -> None:
    model = ir.load(bundle / "model.onnx")
    assert sum(node.op_type == "RoundedMatMul" for node in model.graph) == 2 * 5  # query, key and value are one
    stored = [v.const_value for n, v in model.graph.initializers.items() if ".int7" in n and ".scales" not in n]
    assert len(stored) == 2 * 5
    assert all(x.dtype == ir.DataType.INT8 and 0 < np.abs(x.numpy()).max() <= 63 for x in stored)


def decoder_with_rounded_inputs(bundle: Path, source: Path) -> Decoder:
    """PyTorch, by the definitions: weights as the record smooths and rounds them, inputs rounded before each product."""
    original = open_checkpoint(source)
    record = read_record(bundle / "weights.json", original.shapes(), original.config)
    smoothed, decoder = record.smoothed(original), load_decoder(original)

    def round_input(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        step = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / step) * step

    for name, parameter in decoder.named_parameters():
        tensor = record.tensors.get(name)
        parameter.data = smoothed.read(name) if tensor is None else restored(rounded(smoothed.read(name), tensor.bits))
        if "_proj" in name:
            decoder.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(round_input)
    return decoder.eval()


def test_it_costs_what_pytorch_says_that_rounding_costs(bundle, source) -> None:
    tokens = torch.arange(160).view(5, 32)
    before = reference(load_decoder(open_checkpoint(source)), tokens)
    with torch.inference_mode():
        after = decoder_with_rounded_inputs(bundle, source)(tokens).logits.double().log_softmax(-1)
    exact = torch.from_numpy(before.logits).double().log_softmax(-1)
    kl = (exact.exp() * (exact - after)).sum(-1).mean().item()
    assert weights_cost(bundle, read_manifest(bundle), before).kl == pytest.approx(kl, rel=0.1)


def test_a_prompt_read_at_once_is_as_good_as_token_by_token(bundle) -> None:
    backend, ids = load(bundle, check=False).backend, np.arange(3, 23)
    one_by_one, at_once = backend.new_cache(1, 32), backend.new_cache(1, 32)
    right = backend.prefill(one_by_one, 0, ids[:1])
    for token in ids[1:]:
        right = backend.decode(one_by_one, np.array([token]), np.ones(1, np.bool_))[0]
    difference = np.abs(backend.prefill(at_once, 0, ids) - right)  # scales are each row's own
    assert difference.mean() < 0.01 * np.abs(right).mean()  # what is between two numbers may be rounded either way


def test_standard_ops_compute_the_same(bundle, tmp_path) -> None:
    model = ir.load(bundle / "model.onnx")
    use_standard_body(model)
    use_quantized_bodies(model, standard=True)
    assert {domain for f in model.functions.values() for domain in f.opset_imports} == {""}
    ir.save(model, tmp_path / "standard.onnx", external_data="standard.onnx.data")
    ids = np.arange(3, 12)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {value.name: np.zeros((1, 2, 16, 16), np.float32) for value in model.graph.inputs[2:]}
    sessions = [ort.InferenceSession(path) for path in (tmp_path / "standard.onnx", bundle / "model.onnx")]
    standard, ours = (session.run(["logits"], feeds)[0] for session in sessions)
    assert np.abs(standard - ours).mean() < 0.02 * np.abs(ours).mean()


@pytest.mark.parametrize(
    "part", ["mlp.down_proj.weight.int7.scales", "mlp.gate_proj.weight.int7.T", "layernorm.weight"]
)
def test_what_is_wrong_in_the_file_is_seen(part, bundle, source, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    model = ir.load(bundle / "model.onnx")
    value = next(v for n, v in model.graph.initializers.items() if n.endswith(part))
    changed = value.const_value.numpy().copy()
    changed[3] = changed[3] // 2 + 1 if changed.dtype == np.int8 else 2 * changed[3]
    value.const_value = ir.tensor(changed)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    report = verify_bundle(tmp_path, OwnModel(open_checkpoint(source)), read_manifest(bundle), 4, Reporter(quiet=True))
    assert "weights, bit for bit" in {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False, "qkv_bias": True, "model_type": "qwen2"},
    ],
    ids=["biases", "a head of its own"],
)
def test_other_models_are_exported_and_verified(config, tmp_path) -> None:
    source = tmp_path / "source"
    save_source(source, replace(CONFIG, **config))
    code, output = run("export", source, "-o", tmp_path / "w8a8", "--weights", "w8a8", "-q")
    assert code == 0, output
    code, output = run("verify", tmp_path / "w8a8", "--against", source, "-q")
    assert code == 0, output


@pytest.mark.parametrize(
    ("smoothing", "message"),
    [
        ([], "has no exponents for smoothing"),
        ({UP: [1] * 79}, f"{UP} cannot have been smoothed so"),
        ({UP: [0.5] * 80}, f"{UP} cannot have been smoothed so"),
        ({UP: [100] * 80}, f"{UP} cannot have been smoothed so"),
        ({"lm_head.weight": [1] * 64}, "lm_head.weight cannot have been smoothed so"),
    ],
)
def test_a_record_of_wrong_smoothing_is_one_line(smoothing, message, bundle, source, tmp_path) -> None:
    content = json.loads((bundle / "weights.json").read_text()) | {"smoothing": smoothing}
    (tmp_path / "weights.json").write_text(json.dumps(content))
    original = open_checkpoint(source)
    with pytest.raises(BundleError, match=message):
        read_record(tmp_path / "weights.json", original.shapes(), original.config)


def test_tensorrt_refuses_it_by_name(bundle, source, tmp_path) -> None:
    with pytest.raises(BuildError, match=r"products with rounded inputs \(--weights w8a8\)"):
        lower(bundle / "model.onnx", "native", 64)
    options = ("--target", "tensorrt-rtx", "--sm", "86")
    code, output = run("export", source, "-o", tmp_path / "no", "--weights", "w8a8", *options)
    assert code == 2
    assert "--weights w8a8: headfold has not in TensorRT: products with rounded inputs" in output
    assert not (tmp_path / "no").exists()


def test_weights_that_are_not_there_are_refused_by_name(source, tmp_path) -> None:
    code, output = run("export", source, "-o", tmp_path / "no", "--weights", "mxfp4")
    assert code == 2
    assert "'--weights': 'mxfp4' is not one of" in output
    assert len(output.strip().splitlines()) == 1
