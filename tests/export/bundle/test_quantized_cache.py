"""A bundle with an int8 or float8 KV cache: calibrated, proven against PyTorch with the same cache, run, and built for TensorRT."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from headfold.export.bundle.cache_scales import cache_scales, quantization_cost
from headfold.export.bundle.pipeline import CacheCalibration, ExportOptions
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.data.calibration import read_tokens
from headfold.export.exportables.opening import open_exportable
from headfold.export.parity.exact.weights import stored_cache
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.runtime import BundleError, ConfigError, load
from headfold.runtime.manifest import read_manifest

CAPACITY = 32


def run(*arguments: object) -> tuple[int, str]:
    """Exit code, and what is on standard error and output."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def bundle(toys, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "int8"
    data = ("--data", toys / "text.txt", "--calibration-tokens", 512)
    code, output = run(
        "export", toys / "student", "-o", path, "--kv-cache", "int8", *data, "--capacity", CAPACITY, "-q"
    )
    assert code == 0, output
    return path


def test_scales_are_the_largest_magnitudes_of_the_text(toys) -> None:
    checkpoint = open_checkpoint(toys / "student")
    decoder, tokens = load_decoder(checkpoint), torch.arange(60).view(3, 20)
    scales = cache_scales(decoder, tokens, torch.int8)
    cache = decoder.new_cache(3, 20)
    decoder(tokens, None, cache)
    for (keys, values), (key_scale, value_scale) in zip(cache, scales, strict=True):
        torch.testing.assert_close(key_scale, keys.abs().amax((0, 2, 3)) / 127)
        torch.testing.assert_close(value_scale, values.abs().amax((0, 2, 3)) / 127)
    fine = quantization_cost(decoder, tokens, torch.int8, scales)
    coarse = quantization_cost(
        load_decoder(checkpoint), tokens, torch.int8, [(16 * key, 16 * value) for key, value in scales]
    )
    # Errors 16 times as large cost 256 times as much; what `fine` costs is near what float32 rounds.
    assert fine.kl < 0.1 * coarse.kl


def test_the_cache_takes_a_byte_and_the_manifest_says_so(bundle) -> None:
    manifest = read_manifest(bundle)
    assert manifest.format_version == 3
    assert manifest.cache_dtype == "int8"
    assert manifest.cache.quantization.calibration_tokens == 512
    assert manifest.cache.quantization.kl < 1e-2
    assert {spec.dtype for spec in manifest.inputs if spec.name.startswith("past_key_values.")} == {"int8"}
    cache = load(bundle).backend.new_cache(2, CAPACITY)
    assert cache.itemsize == 1
    code, output = run("inspect", bundle, "--json")
    assert code == 0
    assert '"kv_bytes_per_token": 128' in output  # keys and values, 2 layers, 2 heads of 16, a byte each


def test_onnx_runtime_decodes_as_pytorch_does(bundle, toys) -> None:
    backend = load(bundle).backend
    decoder = load_decoder(open_checkpoint(toys / "student"))
    cache = stored_cache(ir.load(bundle / "model.onnx"), "int8", 2)
    decoder.quantize_cache(torch.int8, cache.scales)
    cache, ids = backend.new_cache(1, CAPACITY), np.arange(10)
    logits = backend.prefill(cache, 0, ids)
    for token in (3, 1, 4):
        expected = decoder(torch.tensor(ids)[None]).logits[0, -1]
        np.testing.assert_allclose(logits, expected, atol=1e-2)  # a value may be rounded the other way
        ids = np.append(ids, token)
        logits = backend.decode(cache, np.array([token]), np.ones(1, np.bool_))[0]


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_a_wrong_scale_is_caught(name, factor, bundle, toys, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path / "planted")
    model = ir.load(tmp_path / "planted" / "model.onnx")
    value = model.graph.initializers[f"model.layers.1.self_attn.{name}"]
    value.const_value = ir.tensor(np.float32(factor) * value.const_value.numpy())
    ir.save(model, tmp_path / "planted" / "model.onnx")
    manifest, source = read_manifest(bundle), open_exportable(toys / "student")
    report = verify_bundle(tmp_path / "planted", source, manifest, 4, Reporter(quiet=True))
    assert {check.name for check in report.checks if not check.passed} == {"cache scales"}
    assert "cache scales: of layer 1 is off by 0.1" in report.failure()


def test_float8_is_proven_here_and_runs_elsewhere(toys, tmp_path) -> None:
    path = tmp_path / "float8"
    options = ("--kv-cache", "float8_e4m3fn", "--calibration-tokens", 256, "--capacity", CAPACITY, "-q")
    code, output = run("export", toys / "student", "-o", path, *options)  # on text that the model writes
    assert code == 0, output
    assert read_manifest(path).parity["passed"]
    code, output = run("generate", path, "the cat", "-n", "2")
    assert code == 2
    assert "ONNX Runtime has no float8 cache on CPUs. Export with --kv-cache int8" in output


def test_a_cache_that_costs_too_much_is_not_published(toys, tmp_path) -> None:
    """Values of one channel that are a thousand times as large take the range of all others; what the head makes of it undoes that."""
    planted = shutil.copytree(toys / "student", tmp_path / "planted")
    size = json.loads((planted / "config.json").read_text())["head_dim"]
    weights = load_file(planted / "model.safetensors")
    for name, weight in weights.items():
        if "v_proj.weight" in name:
            weight[::size] *= 1024
        if "o_proj.weight" in name:
            weight[:, ::size] /= 1024
    save_file(weights, planted / "model.safetensors")
    options = ("--kv-cache", "int8", "--data", toys / "text.txt", "--calibration-tokens", 256, "--capacity", CAPACITY)
    bound = ("--max-kl", "0.0001")  # a toy's attention does little
    assert run("export", toys / "student", "-o", tmp_path / "sound", *options, *bound, "-q")[0] == 0
    code, output = run("export", planted, "-o", tmp_path / "no", *options, *bound, "-q")
    assert code == 1
    assert "the int8 cache costs " in output
    assert "Leave --kv-cache out, or allow it with --max-kl. No bundle was written." in output
    assert not (tmp_path / "no").exists()
    assert run("export", planted, "-o", tmp_path / "allowed", *options, "--max-kl", "10", "-q")[0] == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            CacheCalibration,
            {"dtype": "int4"},
            "CacheCalibration.dtype: is 'int4'. Input should be 'int8' or 'float8_e4m3fn'.",
        ),
        (CacheCalibration, {"dtype": "int8", "data": "a.txt"}, "CacheCalibration.data: is 'a.txt'"),
        (CacheCalibration, {"dtype": "int8", "max_kl": float("nan")}, "--max-kl: is nan"),
        (
            ExportOptions,
            {"decode_steps": 0},
            "ExportOptions.decode_steps: is 0. Input should be greater than or equal to 1.",
        ),
        (ExportOptions, {"dtype": torch.float16}, "ExportOptions.dtype: is torch.float16"),
        (ExportOptions, {"weights": "int8"}, "ExportOptions.weights: is 'int8'"),
        (ExportOptions, {"capacity": "5"}, "ExportOptions.capacity: is '5'"),
    ],
)
def test_what_a_caller_in_python_may_not_ask_for_is_one_line(kind, options, message) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("found", [{"kl": float("nan")}, {"top1": 7.0}])
def test_costs_that_nobody_measures_are_refused(found, bundle, tmp_path) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["cache"]["quantization"] |= found
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"cache.quantization.{next(iter(found))}: Input should be"):
        read_manifest(other)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[5] * 9], "has rows of 9 tokens, and a capacity of 8"),
        ([[1.5]], "its token ids are not of a vocabulary of 10"),
        ([[True]], "its token ids are not of a vocabulary of 10"),
        ([{}], "has no token ids"),
        ([[10]], "its token ids are not of a vocabulary of 10"),
    ],
)
def test_tokens_that_no_scales_can_be_from_are_one_line(tokens, message, tmp_path) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps({"token_ids": tokens}))
    with pytest.raises(BundleError, match=message):
        read_tokens(tmp_path / "calibration.json", 10, 8)


def test_text_without_a_quantized_cache_is_refused(toys, tmp_path) -> None:
    code, output = run("export", toys / "student", "-o", tmp_path / "no", "--data", toys / "text.txt")
    assert code == 2
    assert (
        "--data: is for calibrating a quantized cache or rounded weights. Add --kv-cache int8, or --weights int8."
        in output
    )


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_the_plugin_takes_it_and_native_attention_refuses(kind, toys, tmp_path) -> None:
    path = tmp_path / kind
    sizes = ("--sm", 89, "--max-batch", 3, "--max-input", 32)
    options = ("--dtype", "float16", "--kv-cache", kind, "--calibration-tokens", 256, "--capacity", CAPACITY, "-q")
    code, output = run("export", toys / "student", "-o", path, *options, "--target", "tensorrt-rtx", *sizes)
    assert code == 2
    assert f"TensorRT's own attention has no {kind} cache. Use --attention plugin" in output
    assert not path.exists()
    plugin = ("--target", "tensorrt-rtx", "--attention", "plugin", *sizes)
    code, output = run("export", toys / "student", "-o", path, *options, *plugin)
    assert code == 0, output
    manifest = read_manifest(path)
    (engine,) = manifest.engines
    assert {spec.dtype for spec in engine.outputs if spec.name.startswith("present.")} == {kind}
    assert engine.layers == {"PLUGIN_V3": 2}
    assert len(engine.aliases) == 4
    verify = ("verify", path, "--against", toys / "student", "--backend", "tensorrt-network", "--decode-steps", 4, "-q")
    code, output = run(*verify, "--attention", "plugin")
    assert code == 0, output
    code, output = run(*verify)
    assert code == 2
    assert f"TensorRT's own attention has no {kind} cache. Use --attention plugin" in output
    shutil.rmtree(path)
