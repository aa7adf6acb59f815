"""Rounded weights in float16 graphs: scales are float16, what the file holds is what is computed with, and it runs on a CPU."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from block_models import CONFIG, run
from quantized_models import MAKE

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import restored, rounded
from headfold.export.quantization.gptq import Inputs, gptq
from headfold.plugins.quantized.reference import dequantized
from headfold.runtime import load
from headfold.runtime.manifest import read_manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float16") / "source"
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.02 if "norm" in name else 0.1)
    save_hf(path, MemoryCheckpoint(Path("memory"), CONFIG, decoder.state_dict()), torch.float32)
    return path


@pytest.mark.parametrize("scheme", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_it_is_proven_and_computes_with_what_its_file_holds(scheme, source, tmp_path) -> None:
    options = ("--weights", scheme, "--dtype", "float16", "--max-kl", "1", "-q")
    code, output = run("export", source, "-o", tmp_path / "out", *options)
    assert code == 0, output
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.weights.scheme, manifest.parity["passed"]) == ("float16", scheme, True)
    values = {name: x.const_value for name, x in ir.load(tmp_path / "out" / "model.onnx").graph.initializers.items()}
    assert {x.dtype for name, x in values.items() if name.endswith(".scales")} == {ir.DataType.FLOAT16}
    decoder, records = load_decoder(open_checkpoint(source), torch.float16).float(), {}
    for name, record in json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"].items():
        key = next(key for key in values if f"{name}.int{record['bits']}" in key.split("+"))
        parts = key.split("+")
        scales = values["+".join(f"{part}.scales" for part in parts)].numpy()
        whole = torch.from_numpy(dequantized(values[key].numpy(), scales, record["bits"])).float()
        before = parts[: parts.index(f"{name}.int{record['bits']}")]
        first = sum(decoder.get_parameter(part.rpartition(".int")[0]).shape[0] for part in before)
        records[name] = whole[first : first + decoder.get_parameter(name).shape[0]]
    for name, weight in records.items():
        decoder.get_parameter(name).data = weight
    backend, ids = load(tmp_path / "out").backend, np.arange(3, 12)
    logits = backend.prefill(backend.new_cache(1, 32), 0, ids)
    expected = decoder(torch.tensor(ids)[None]).logits[0, -1].numpy()
    # of inputs rounded to eight bits (a step is 1/127 of the largest of 32), too, where the gate chose them
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())
    code, output = run("verify", tmp_path / "out", "--against", source, "-q")
    assert code == 0, output


@pytest.mark.parametrize("kind", [pytest.param("GGUF", marks=pytest.mark.slow), "GPTQ"])
def test_what_is_quantized_keeps_its_own_bits_where_float16_holds_its_scales(kind, tmp_path) -> None:
    source = MAKE[kind](tmp_path)
    code, output = run("export", source, "-o", tmp_path / "out", "--weights", "int4", "--dtype", "float16")
    assert code == 0, output
    said = "rounded again, for float16 does not hold its scales, --dtype float32 does: model.layers.0."
    assert (said in " ".join(output.split())) == (kind == "GGUF")
    tensors, checkpoint = (
        json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"],
        open_checkpoint(source),
    )
    for name, tensor in tensors.items():
        parts = checkpoint.quantized(name)
        if parts is None:
            continue
        steps = [x.float() for x in (parts.scales, parts.offsets) if x is not None]
        exact = all(torch.equal(x.half().float(), x) for x in steps)
        assert (tensor["method"] == "kept") <= exact
    assert (
        sum(tensor["method"] == "kept" for tensor in tensors.values()) >= 4
    )  # products of scales of scales are no float16


def test_scales_are_float16_before_numbers_are_found() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    moments = torch.eye(64, dtype=torch.float64)
    assert torch.equal((by_gptq := gptq(weight, Inputs.of(moments), 4, torch.float16).scales).half().float(), by_gptq)
    for rounding in (rounded(weight, 4, torch.float16), rounded(weight, 8, torch.float16)):
        assert torch.equal(rounding.scales.half().float(), rounding.scales)
        assert ((restored(rounding) - weight).abs() <= rounding.scales.abs().repeat_interleave(32, 1) * 1.01).all()
    tiny = rounded(weight * 1e-9, 8, torch.float16)  # no float16 is so small a scale
    assert not restored(tiny).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--weights", "int4", "--dtype", "bfloat16"),
            "--dtype bfloat16: does not go with weights of four or eight bits",
        ),
        (("--weights", "int8", "--kv-cache", "float8_e4m3fn"), "--kv-cache float8_e4m3fn: does not go with weights of"),
        (("--weights", "w8a8", "--dtype", "float16"), "--dtype float16: does not go with products of integers"),
    ],
)
def test_what_no_kernel_has_is_one_line(options, message, source, tmp_path) -> None:
    code, output = run("export", source, "-o", tmp_path / "no", *options)
    assert code == 2
    assert message in output
