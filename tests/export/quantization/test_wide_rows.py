"""A vocabulary whose first rows have eight bits and the others four: chosen, stored apart, proven, on every road and in TensorRT."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from block_models import CONFIG, checkpoint, exported, run
from random_transformers import save_random
from rounded_engines import installed, network_report

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.exportables.own import OwnModel
from headfold.export.graph.bodies import use_quantized_bodies, use_standard_body
from headfold.export.model.rounding import as_rounded, joined, restored, rounded
from headfold.export.model.storing import stored_part, stored_shapes
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.products import set_level_in_file
from headfold.export.quantization.shelf import Shelf
from headfold.plugins.quantized.reference import dequantized
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import MODEL, read_manifest

EMBEDDING, WIDE = "model.embed_tokens.weight", 64


@pytest.fixture
def in_part(monkeypatch) -> None:
    """Of all that could be wide in part so many rows are, and a layer's product is wide as a whole."""

    def choose(bits, shapes, costs, *asked):
        assert all(WIDE in cost or [*cost] == [0] for cost in costs.values())
        some = next(names for names, cost in costs.items() if len(cost) == 1)
        parts = {name: WIDE for names, cost in costs.items() if len(cost) > 1 for name in names}
        return dict(bits) | dict.fromkeys(some, 8), parts

    monkeypatch.setattr("headfold.export.quantization.rounding.choose_bits", choose)


def export(source: Path, output: Path, *options: object) -> Path:
    return exported(source, output, "--weights", "mixed", "--bits", "6", "--max-kl", "9", *options)


def numbers(bundle: Path, name: str) -> np.ndarray:
    """What a matrix in the file stands for, by numpy."""
    values = {name: x.const_value.numpy() for name, x in ir.load(bundle / MODEL).graph.initializers.items()}
    pieces = [dequantized(values[f"{name}.int{bits}"], values[f"{name}.int{bits}.scales"], bits) for bits in (8, 4)]
    return np.concatenate(pieces)


def test_each_row_has_its_own_width() -> None:
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    mixed, eight, four = rounded(w, 4, wide_rows=32), rounded(w, 8), rounded(w, 4)
    expected = torch.cat((restored(eight)[:32], restored(four)[32:]))
    assert torch.equal(restored(mixed), expected)
    assert torch.equal(as_rounded(w, 4, wide_rows=32), expected)
    assert mixed.form.size((96, 64)) == 64 * (32 * 8 + 64 * 4)
    parts = {part: stored_part(mixed, part) for part in stored_shapes("w.int4", mixed.form, (96, 64))}
    shapes = {part: tuple(x.shape) for part, x in parts.items()}
    assert shapes == stored_shapes("w.int4", mixed.form, (96, 64))
    assert shapes["w.int4.int8"] == (32, 2, 32)
    assert shapes["w.int4.int4"] == (64, 2, 16)
    again = joined(mixed.pieces())
    assert again.form == mixed.form
    assert torch.equal(again.values, mixed.values)


def test_a_weight_that_is_wide_in_part_lies_on_the_shelf_as_it_is(tmp_path) -> None:
    mixed = rounded(torch.randn(96, 64), 4, wide_rows=32)
    Shelf(tmp_path, 4, [b""]).put({"head": mixed})
    shelf = Shelf(tmp_path, 4, [b""])
    shelf.put({"head": mixed})
    assert shelf["head"].form == mixed.form
    assert torch.equal(restored(shelf["head"]), restored(mixed))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, ()),
        ({"tie_word_embeddings": False}, ("--all-logits",)),
        ({}, ("--rounding", "nearest", "--dtype", "float16")),
        ({"tie_word_embeddings": False, "model_type": "qwen2", "qkv_bias": True}, ("--block-size", "64")),
    ],
    ids=["tied", "two matrices", "float16", "large blocks"],
)
def test_it_is_proven_and_computes_with_what_its_file_holds(config, options, in_part, tmp_path) -> None:
    original = checkpoint(replace(CONFIG, **config))
    save_hf(tmp_path / "source", original, torch.float32)
    bundle = export(tmp_path / "source", tmp_path / "bundle", *options)
    manifest, record = read_manifest(bundle), json.loads((bundle / "weights.json").read_text())["tensors"]
    assert manifest.parity["passed"]
    in_parts = {name: tensor for name, tensor in record.items() if tensor["wide_rows"]}
    assert in_parts.keys() == {EMBEDDING, *(() if original.config.tie_word_embeddings else ("lm_head.weight",))}
    assert {(tensor["bits"], tensor["wide_rows"]) for tensor in in_parts.values()} == {(4, WIDE)}
    shapes = open_checkpoint(tmp_path / "source").shapes()
    sizes = {name: np.prod(shapes[name]) for name in record}
    wide = {name: tensor["wide_rows"] * shapes[name][1] for name, tensor in record.items()}
    total = sum(tensor["bits"] * sizes[name] + 4 * wide[name] for name, tensor in record.items())
    assert manifest.weights.bits == pytest.approx(total / sum(sizes.values()))
    assert run("verify", bundle, "--against", tmp_path / "source", "-q")[0] == 0
    for name in in_parts:
        error = numbers(bundle, name) - original.read(name).numpy()
        assert np.square(error[:WIDE]).mean() < np.square(error[WIDE:]).mean() / 50


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_the_same(tied, in_part, tmp_path, monkeypatch) -> None:
    save_hf(tmp_path / "source", checkpoint(replace(CONFIG, tie_word_embeddings=tied)), torch.float32)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, CONFIG.vocab_size, 4096))
    records = []
    for name, large in (("in memory", 1 << 40), ("on the disk", 0)):
        monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", large)
        bundle = export(tmp_path / "source", tmp_path / name, "--data", tmp_path / "tokens.npy", "--no-verify")
        records.append(json.loads((bundle / "weights.json").read_text())["tensors"])
    whole, streamed = records
    assert whole[EMBEDDING]["wide_rows"] == WIDE
    assert {name: tensor["sha256"] for name, tensor in whole.items()} == {
        name: tensor["sha256"] for name, tensor in streamed.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])  # the one has its embedding as head
def test_so_it_is_by_way_of_transformers(model_type, in_part, tmp_path) -> None:
    save_random(model_type, tmp_path / "model")
    bundle = export(tmp_path / "model", tmp_path / "bundle")
    manifest, record = read_manifest(bundle), json.loads((bundle / "weights.json").read_text())["tensors"]
    assert (manifest.road, manifest.parity["passed"]) == ("transformers", True)
    assert [tensor["wide_rows"] for tensor in record.values() if tensor["wide_rows"]] == [WIDE] * (
        1 if model_type == "gemma3_text" else 2
    )


def test_standard_ops_compute_the_same(in_part, tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(CONFIG), torch.float32)
    bundle = export(tmp_path / "source", tmp_path / "bundle")
    set_level_in_file(bundle / MODEL, 1)
    model = ir.load(bundle / MODEL)
    use_standard_body(model)
    use_quantized_bodies(model, standard=True)
    ir.save(model, tmp_path / "standard.onnx", external_data="standard.onnx.data")
    ids = np.arange(WIDE - 4, WIDE + 5)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {value.name: np.zeros((1, 2, 16, 16), np.float32) for value in model.graph.inputs[2:]}
    paths = (bundle / MODEL, tmp_path / "standard.onnx")
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
    kernel, standard = (session.run(["logits"], feeds)[0] for session in sessions)
    np.testing.assert_allclose(standard, kernel, atol=1e-4)


@installed
@pytest.mark.parametrize("attention", ["native", pytest.param("plugin", marks=pytest.mark.slow)])
def test_the_parsed_network_agrees_with_pytorch(attention, in_part, tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(CONFIG), torch.float32)
    bundle = export(tmp_path / "source", tmp_path / "bundle", "--rounding", "nearest", "--no-verify")
    report = network_report(bundle, tmp_path / "source", attention)
    assert report.passed, report.failure()


@pytest.fixture
def unproven(in_part, tmp_path) -> Path:
    save_hf(tmp_path / "source", checkpoint(CONFIG), torch.float32)
    return export(tmp_path / "source", tmp_path / "bundle", "--no-verify")


def failed_checks(bundle: Path) -> list[str]:
    exportable = OwnModel(open_checkpoint(bundle.parent / "source"))
    report = verify_bundle(bundle, exportable, read_manifest(bundle), 2, Reporter(quiet=True))
    return [check.name for check in report.checks if not check.passed]


def test_a_wrong_scale_of_its_wide_rows_is_seen(unproven) -> None:
    model = ir.load(unproven / MODEL)
    scales = model.graph.initializers[f"{EMBEDDING}.int8.scales"]
    changed = scales.const_value.numpy().copy()
    changed[5, 1] *= 1.01
    scales.const_value = ir.tensor(changed)
    ir.save(model, unproven / MODEL, external_data="model.onnx.data")
    assert "weights by GPTQ, relative squared error" in failed_checks(unproven)


def test_a_scheme_that_has_no_such_rows_is_seen(unproven) -> None:
    change(unproven / "manifest.json", lambda content: content["weights"].update(scheme="int4"))
    assert "what the manifest says of rounded weights" in failed_checks(unproven)


@pytest.mark.parametrize("rows", [32, CONFIG.vocab_size])
def test_another_number_of_rows_is_refused(rows, unproven) -> None:
    change(unproven / "weights.json", lambda content: content["tensors"][EMBEDDING].update(wide_rows=rows))
    with pytest.raises(BundleError, match=r"model.onnx: its|cannot have been rounded so"):
        failed_checks(unproven)


def change(path: Path, how: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))
