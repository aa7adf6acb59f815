"""Weights of four and eight bits in TensorRT: the lowered graph has the same numbers, the parsed network computes with them."""

import shutil
from dataclasses import replace
from pathlib import Path

import block_models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from gguf_of_decoder import Kind
from quantized_models import MAKE, in_directory, in_gguf
from quantized_weights import gptq
from rounded_engines import installed, network_report

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main
from headfold.export.engine.lowering import lower
from headfold.export.engine.network_runner import network_candidate
from headfold.export.engine.options import BuildOptions
from headfold.export.engine.preflight import preflight
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedCheckpoint
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import forms_of
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import read_manifest

CONFIG = replace(block_models.CONFIG, vocab_size=96, max_position_embeddings=48)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.02 if "norm" in name else 0.1)
    path = tmp_path_factory.mktemp("rounded") / "source"
    save_hf(path, MemoryCheckpoint(Path("memory"), CONFIG, decoder.state_dict()), torch.float32)
    return path


@pytest.fixture(scope="module")
def bundle(source) -> Path:
    """With weights of both widths, in blocks of 64 where they divide a row, and an embedding that is the head, too."""
    path = source.parent / "mixed"
    arguments = ["export", source, "-o", path, "--weights", "mixed", "--bits", "6", "--rounding", "nearest", "-q"]
    arguments += ["--block-size", "64"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return path


def restored(bundle: Path, source: Path) -> RoundedCheckpoint:
    names = ir.load(bundle / "model.onnx").graph.initializers
    original = open_checkpoint(source)
    bits = {name: 4 if any(f"{name}.int4" in known for known in names) else 8 for name in original.shapes()}
    rounded = {name: width for name, width in bits.items() if "norm" not in name}
    return RoundedCheckpoint(original, forms_of(rounded, original.shapes(), 64, narrow=rounded))


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_every_matrix_is_dequantized_to_what_it_stands_for(attention, bundle, source) -> None:
    path = bundle / "model.onnx"
    model, expected = lower(path, attention, 48), restored(bundle, source)
    preflight(model, attention, path)
    found = set()
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        values, scales = (value.const_value.numpy() for value in node.inputs)
        wide = values.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
        sources = node.inputs[0].name.removesuffix(".signed").split("+")
        sources = [name.removesuffix(".int4").removesuffix(".int8") for name in sources]
        np.testing.assert_array_equal(wide.reshape(len(values), -1), torch.cat([expected.read(x) for x in sources]))
        found.update(sources)
    assert found == set(expected.forms)
    assert {value.dtype for value in model.graph.initializers.values()} >= {ir.DataType.INT4, ir.DataType.INT8}


@installed
@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_the_parsed_network_agrees_with_pytorch(attention, bundle, source) -> None:
    report = network_report(bundle, source, attention)
    assert report.passed, report.failure()


KEPT = {  # with minima; with zero points of four bits, in blocks of 64 and 128; of eight bits
    "GGUF": lambda directory: in_gguf(directory, v_proj=Kind.Q4_1),
    "GPTQ": MAKE["GPTQ"],
    "AWQ": MAKE["AWQ"],
    "GPTQ in eight bits": in_directory(
        {"quant_method": "gptq", "bits": 8, "group_size": 128}, gptq(8, 128, False, 1, False)
    ),
}


@installed
@pytest.mark.parametrize("title", KEPT)
def test_networks_of_weights_in_their_own_bits_agree(title, tmp_path) -> None:
    source, bundle = KEPT[title](tmp_path), tmp_path / "bundle"
    arguments = ["export", source, "-o", bundle, "--weights", "int4", "--no-verify", "-q"]
    arguments += ["--dtype", "float16"] if title == "AWQ" else []
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    report = network_report(bundle, source, "native")
    assert report.passed, report.failure()
    if "GPTQ" not in title:
        result = CliRunner().invoke(main, ["build", str(bundle), "--attention", "plugin", "--sm", "86,89", "-q"])
        assert result.exit_code == 0, result.output


def test_blocks_of_16_are_refused(tmp_path) -> None:
    arguments = ["export", in_gguf(tmp_path), "-o", tmp_path / "bundle", "--weights", "int4", "--no-verify", "-q"]
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    model = lower(tmp_path / "bundle" / "model.onnx", "native", 64)
    with pytest.raises(BuildError, match=r"has blocks of 16; .* exported without --weights, in --dtype float16\."):
        preflight(model, "native", tmp_path)


@installed
def test_a_wrong_scale_in_the_network_is_caught(bundle, source, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    model = ir.load(bundle / "model.onnx")
    value = next(v for n, v in model.graph.initializers.items() if n.endswith(".scales") and "down_proj" in n)
    value.const_value = ir.tensor(1.5 * value.const_value.numpy())
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    manifest = read_manifest(bundle)
    candidate = network_candidate(tmp_path, manifest, BuildOptions(attention="native"))
    report = verify_bundle(tmp_path, OwnModel(open_checkpoint(source)), manifest, 4, Reporter(quiet=True), candidate)
    failed = [check.name for check in report.checks if not check.passed]
    assert "prefill" in failed


@installed
@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_engines_are_built(attention, bundle, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    arguments = ["build", str(tmp_path / "bundle"), "--attention", attention, "--sm", "86,89", "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (engine,) = read_manifest(tmp_path / "bundle").engines
    assert engine.attention == attention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.attributes.add(ir.AttrInt64("axis", 0)), "has blocks in axis 0"),
        (
            lambda node: node.attributes.add(ir.AttrInt64("block_size", 16)),
            "has blocks of 16; TensorRT is known to read",
        ),
        (
            lambda node: node.attributes.add(ir.AttrInt64("output_dtype", 1)),
            "attribute output_dtype is not among those",
        ),
        (lambda node: node.replace_input_with(1, node.inputs[0]), "its scales are not"),
    ],
)
def test_what_tensorrt_would_misread_is_refused(change, message, bundle) -> None:
    path = bundle / "model.onnx"
    model = lower(path, "native", 48)
    change(next(node for node in model.graph if node.op_type == "DequantizeLinear"))
    with pytest.raises(BuildError, match=message):
        preflight(model, "native", path)
