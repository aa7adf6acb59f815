"""Checkpoints that are quantized already: their bundles have the same numbers, and prove it; faults in them are seen."""

import json
import logging
import re
import shutil
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from gguf_of_decoder import Kind
from quantized_models import MAKE, in_gguf
from safetensors.torch import save_file

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.exportables.own import OwnModel
from headfold.export.graph.bodies import set_level, use_quantized_bodies, use_standard_body
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import reference, weights_cost
from headfold.export.quantization.gate import pass_gate
from headfold.plugins.quantized.reference import dequantized
from headfold.runtime.errors import VerificationError
from headfold.runtime.manifest import read_manifest


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture(scope="module", params=MAKE)
def kept(request, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and its bundle."""
    source = MAKE[request.param](tmp_path_factory.mktemp("kept"))
    bundle = source.parent / "bundle"
    said = BufferingHandler(100)
    logging.getLogger().addHandler(said)
    code, output = run("export", source, "-o", bundle, "--weights", "int4", "-q")
    logging.getLogger().removeHandler(said)
    assert code == 0, output
    assert [record.getMessage() for record in said.buffer if record.levelno >= logging.WARNING] == []
    return source, bundle


def stored(bundle: Path, name: str, rows: slice) -> np.ndarray:
    """A weight, put together from the file alone."""
    tensors = json.loads((bundle / "weights.json").read_text())["tensors"][name]
    values, parts = ir.load(bundle / "model.onnx").graph.initializers, {}
    for value in values.values():
        label = value.name.removesuffix(".T")
        if name in label:
            kind = label.rpartition("weight.int" + str(tensors["bits"]))[2] or ".values"
            found = value.const_value.numpy()
            parts[kind] = (found.T if value.name.endswith(".T") else found)[rows]
    order = values[f"order.{tensors['order']}"].const_value.numpy() if tensors["order"] else slice(None)
    zeros, offsets = parts.get(".zeros"), parts.get(".offsets")
    wide = dequantized(parts[".values"], parts[".scales"], tensors["bits"], zeros)
    wide = wide if offsets is None else wide + offsets.astype(float).repeat(tensors["block_size"], 1)
    result = np.empty(wide.shape, np.float32)
    result[:, order] = wide
    return result


def test_every_weight_in_the_file_is_the_checkpoints_own_bit_for_bit(kept) -> None:
    source, bundle = kept
    checkpoint, record = open_checkpoint(source), json.loads((bundle / "weights.json").read_text())["tensors"]
    names = [name for name, tensor in record.items() if tensor["method"] == "kept"]
    assert len(names) >= 7
    for name in names:
        assert record[name]["relative_squared_error"] == 0
        assert record[name]["quantized"] == checkpoint.kind(name) is not None
        first = {"k_proj": 128, "v_proj": 192 if record[name]["block_size"] > 16 else 0}.get(name.split(".")[-2], 0)
        rows = slice(first, first + checkpoint.shapes()[name][0])
        np.testing.assert_array_equal(stored(bundle, name, rows), checkpoint.read(name))


def test_it_is_proven_measured_and_small(kept) -> None:
    source, bundle = kept
    manifest = read_manifest(bundle)
    names = [check["name"] for check in json.loads((bundle / "parity.json").read_text())["checks"]]
    assert any(name.startswith("weights kept in their own bits") for name in names)
    assert manifest.weights.cost.kl < 0.01
    size = 4 * sum(np.prod(shape) for shape in open_checkpoint(source).shapes().values())
    assert manifest.files["model.onnx.data"].size < size / 3
    code, output = run("verify", bundle, "--against", source, "-q")
    assert code == 0, output


def test_standard_ops_compute_the_same(kept, tmp_path) -> None:
    _, bundle = kept
    ids, answers = np.arange(3, 12)[None], []
    for standard in (False, True):
        model = ir.load(bundle / "model.onnx")
        set_level(model, 1)
        if standard:
            use_standard_body(model)
            use_quantized_bodies(model, standard=True)
        ir.save(model, tmp_path / f"{standard}.onnx", external_data=f"{standard}.onnx.data")
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds |= {value.name: np.zeros((1, 2, 16, 32), np.float32) for value in model.graph.inputs[2:]}
        session = ort.InferenceSession(tmp_path / f"{standard}.onnx", providers=["CPUExecutionProvider"])
        answers += session.run(["logits"], feeds)
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)


FAULTS = {  # an initializer, and what goes wrong with it
    "GGUF": (".offsets.T", lambda x: -x),
    "GPTQ": (".zeros", lambda x: x ^ 0x33),
    "GPTQ in act-order": ("order.", lambda x: x[::-1].copy()),
    "compressed-tensors": (".zeros", lambda x: x ^ 0x33),
    "AWQ": (".zeros", lambda x: x ^ 0x33),
}


def test_a_wrong_zero_point_or_offset_is_seen_by_the_proof_and_by_the_gate(kept, request, tmp_path) -> None:
    source, bundle = kept
    label, spoil = FAULTS[request.node.callspec.params["kept"]]
    model = ir.load(bundle / "model.onnx")
    value = next(value for name, value in model.graph.initializers.items() if label in name)
    old = value.const_value.numpy()
    value.const_value = ir.tensor(spoil(old).astype(old.dtype))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    shutil.copy(bundle / "weights.json", tmp_path)
    manifest, original = read_manifest(bundle), open_checkpoint(source)
    before = reference(load_decoder(original), torch.arange(160).view(5, 32))
    assert weights_cost(bundle, manifest, before).kl < 0.01
    strict = manifest.model_copy(update={"weights": manifest.weights.model_copy(update={"max_kl": 0.01})})
    with pytest.raises(VerificationError, match=r"int4 weights cost more than 0\.01 nats"):
        pass_gate(tmp_path, strict, before, list, Reporter(quiet=True))
    report = verify_bundle(tmp_path, OwnModel(original), manifest, 4, Reporter(quiet=True))
    failed = [check.name for check in report.checks if not check.passed]
    assert "weights, bit for bit" in failed
    assert len(failed) > 1  # the arithmetic is wrong, too


def test_what_no_form_holds_is_rounded_again_and_said_so(tmp_path) -> None:
    source = in_gguf(tmp_path, o_proj=Kind.IQ4_NL)
    code, output = run("export", source, "-o", tmp_path / "bundle", "--weights", "int8", "--no-verify")
    assert code == 0, output
    said = " ".join(output.split())
    assert "7 of 8 weights are kept as they are quantized, bit for bit" in said
    name = "model.layers.0.self_attn.o_proj.weight"
    assert f"quantized, and rounded again, for no form here holds it: {name} (IQ4_NL)" in said
    tensor = json.loads((tmp_path / "bundle" / "weights.json").read_text())["tensors"][name]
    assert (tensor["quantized"], tensor["method"], tensor["bits"]) == ("IQ4_NL", "nearest", 8)
    assert 0 < tensor["relative_squared_error"] < 1e-4
    assert read_manifest(tmp_path / "bundle").weights.kept == 7
    _, output = run("inspect", tmp_path / "bundle")
    assert "7 kept as they were quantized" in " ".join(output.split())


def test_w8a8_keeps_what_it_has_in_eight_bits(tmp_path) -> None:
    source, bundle, name = in_gguf(tmp_path, embed_tokens=Kind.Q6_K), tmp_path / "bundle", "model.embed_tokens.weight"
    code, output = run("export", source, "-o", bundle, "--weights", "w8a8")
    assert code == 0, output
    said = " ".join(output.split())
    assert "1 of 8 weights are kept as they are quantized, bit for bit" in said
    assert re.search(r"rounded again, for only --weights int4, int8 and mixed keep it: \S+ \(\w+\) and 6 others", said)
    record = json.loads((bundle / "weights.json").read_text())["tensors"]
    assert (record[name]["method"], record[name]["quantized"]) == ("kept", "Q6_K")
    assert {tensor["bits"] for other, tensor in record.items() if other != name} == {7}
    np.testing.assert_array_equal(stored(bundle, name, slice(None)), open_checkpoint(source).read(name))
    assert read_manifest(bundle).weights.kept == 1


def test_what_an_adapter_changed_is_rounded_again_and_said_so(tmp_path) -> None:
    base, adapter, module = MAKE["GPTQ"](tmp_path), tmp_path / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    rows, columns = open_checkpoint(base).shapes()[f"{module}.weight"]
    parts = {"A": torch.ones(2, columns) / 100, "B": torch.ones(rows, 2) / 100}
    parts = {f"base_model.model.{module}.lora_{part}.weight": x for part, x in parts.items()}
    save_file(parts, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    code, output = run("export", adapter, "-o", tmp_path / "bundle", "--weights", "int4", "--no-verify")
    assert code == 0, output
    said, name = " ".join(output.split()), f"{module}.weight"
    title = "GPTQ 4 bits, groups of 64"
    assert f"quantized, and rounded again, for an adapter is merged into it: {name} ({title})" in said
    record = json.loads((tmp_path / "bundle" / "weights.json").read_text())["tensors"]
    assert [other for other, x in record.items() if x["quantized"] and x["method"] != "kept"] == [name]
    assert record[name]["relative_squared_error"] > 0


def test_a_bundle_is_not_that_of_a_checkpoint_in_other_bits(tmp_path) -> None:
    source = in_gguf(tmp_path)
    code, output = run("export", source, "-o", tmp_path / "bundle", "--weights", "int8", "-q")
    assert code == 0, output
    save_hf(tmp_path / "plain", open_checkpoint(source), torch.float32)
    code, output = run("verify", tmp_path / "bundle", "--against", tmp_path / "plain", "-q")
    assert code == 2
    assert "is not in" in output
    assert "as the bundle kept it" in output
