"""Rounded weights of models without a table of ours: by way of transformers, in memory, of one's own, mixtures of experts."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from block_models import run
from own_modules import Odd, Plain
from random_transformers import random_model, save_random
from torch import nn
from transformers import PreTrainedModel

from headfold.export import ExportOptions, ModuleFacts, export_module, verify_module
from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.exportables.module_road.module_model import ModuleModel
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.graph.trace import export_graph
from headfold.export.model.rounding import Rounded, forms_of, restored, rounded
from headfold.export.progress import Reporter
from headfold.export.quantization.gptq import gptq_layers
from headfold.export.quantization.products import roundable, set_level_in_file
from headfold.export.quantization.rounding import WeightRounding
from headfold.export.quantization.running import Running
from headfold.export.quantization.shelf import InMemory
from headfold.plugins.quantized.reference import dequantized
from headfold.runtime import load
from headfold.runtime.errors import BundleError, CheckpointError, ConfigError
from headfold.runtime.manifest import MODEL, read_manifest

PROMPT = np.random.default_rng(0).integers(3, 300, 21)


def weights_in(bundle: Path) -> dict[str, np.ndarray]:
    """The rounded ones, dequantized by numpy, by their names in the model."""
    values = {name: x.const_value.numpy() for name, x in ir.load(bundle / MODEL).graph.initializers.items()}
    found = {}
    for name, tensor in json.loads((bundle / "weights.json").read_text())["tensors"].items():
        bits = tensor["bits"]
        key = next(key for key in values if f"{name}.int{bits}" in key.split("+"))  # several are end to end
        before = key.split("+").index(f"{name}.int{bits}")
        rows = [values[key], values["+".join(f"{part}.scales" for part in key.split("+"))]]
        found[name] = dequantized(*rows, bits), before, key
    return found


def with_weights_of(bundle: Path, model: nn.Module) -> nn.Module:
    """The model, with what the bundle has in few bits."""
    for name, (matrix, place, key) in weights_in(bundle).items():
        sizes = [model.get_parameter(part.rpartition(".int")[0]).shape[0] for part in key.split("+")]
        start = sum(sizes[:place])
        model.get_parameter(name).data = torch.from_numpy(matrix[start : start + sizes[place]]).float()
    return model


def assert_computes_what_transformers_does(bundle: Path, model: PreTrainedModel) -> None:
    """With the weights that stand in its file, whatever the export says of them."""
    assert_computes_as(bundle, with_weights_of(bundle, model))


def assert_computes_as(bundle: Path, model: nn.Module) -> None:
    """A model that has the bundle's weights."""
    set_level_in_file(bundle / MODEL, 1)
    opened = load(bundle, check=False)
    logits = opened.backend.prefill(opened.backend.new_cache(1, 32), 0, PROMPT)
    np.testing.assert_allclose(logits, model(torch.tensor(PROMPT)[None]).logits[0, -1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "count"), [("gemma3_text", 19), ("phi3", 11)])
def test_a_model_of_transformers_computes_with_what_its_file_holds(model_type, count, tmp_path) -> None:
    save_random(model_type, tmp_path / "model")
    code, output = run("export", tmp_path / "model", "-o", tmp_path / "out", "--weights", "int4", "--max-kl", "9", "-q")
    assert code == 0, output
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.road, manifest.weights.scheme, manifest.parity["passed"]) == ("transformers", "int4", True)
    tensors = json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"]
    assert len(tensors) == count
    for name, tensor in tensors.items():  # in layers by GPTQ; embedding and head are wide
        assert (tensor["bits"], tensor["method"]) == ((4, "gptq") if ".layers." in name else (8, "nearest"))
    code, output = run("verify", tmp_path / "out", "--against", tmp_path / "model", "-q")
    assert code == 0, output
    assert_computes_what_transformers_does(tmp_path / "out", random_model(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["mixed", "w8a8"])
def test_other_schemes_of_a_model_of_transformers_are_proven(scheme, tmp_path) -> None:
    save_random("gemma3_text", tmp_path / "model", num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    options = ("--weights", scheme, *(("--bits", "6") if scheme == "mixed" else ()))
    code, output = run("export", tmp_path / "model", "-o", tmp_path / "out", *options, "-q")
    assert code == 0, output
    tensors = json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"]
    layers = {tensor["bits"] for name, tensor in tensors.items() if ".layers." in name}
    assert layers == ({4, 8} if scheme == "mixed" else {7})


@pytest.mark.slow
def test_a_model_in_memory_stays_as_it_is(tmp_path) -> None:
    model = random_model("phi3")
    before = {name: x.clone() for name, x in model.named_parameters()}
    options = ExportOptions(weights=WeightRounding(scheme="int4", max_kl=9.0), decode_steps=4)
    result = export_module(model, tmp_path / "out", options=options)
    assert result.parity is not None
    assert result.parity.passed
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    assert_computes_what_transformers_does(tmp_path / "out", random_model("phi3"))


def test_products_that_a_checkpoint_has_inputs_first_are_rounded_like_others(tmp_path) -> None:
    """GPT-2's Conv1D: transformers multiplies with its own [in, out] weights, here with what the bundle has in few bits."""
    model = random_model("gpt2", num_hidden_layers=2)
    before = {name: x.clone() for name, x in model.named_parameters()}
    options = ExportOptions(weights=WeightRounding(scheme="int4", max_kl=9.0), decode_steps=4)
    result = export_module(model, tmp_path / "out", options=options)
    assert result.parity is not None
    assert result.parity.passed
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())  # it stays as it is
    rounded_there = weights_in(tmp_path / "out")
    assert len(rounded_there) == 2 + 2 * 4  # embeddings, of positions too, and each layer's products
    for name, (matrix, start, _) in rounded_there.items():
        weight = model.get_parameter(name)
        assert start == 0  # none is joined with another
        found = torch.from_numpy(matrix).float()
        weight.data = found.T if ".h." in name else found
    assert_computes_as(tmp_path / "out", model)


def test_a_module_of_ones_own(tmp_path) -> None:
    model, facts = Plain(), ModuleFacts(max_position_embeddings=64)
    options = ExportOptions(weights=WeightRounding(scheme="int8", max_kl=9.0), decode_steps=4)
    export_module(model, tmp_path / "out", facts, options=options)
    tensors = json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"]
    assert verify_module(tmp_path / "out", model).passed
    assert len(tensors) == 11
    assert "embedding.weight" in tensors
    assert not any("down" in name for name in tensors)  # of 48 inputs
    model.head.weight.data[0, 0] += 1.0
    assert not verify_module(tmp_path / "out", model).passed
    with pytest.raises(ConfigError, match="no weight has blocks of 32 inputs"):
        export_module(Odd(), tmp_path / "no", facts, options=options)


class Headless(Plain):
    """A product before the layers; logits are made with the embedding, by no module."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = torch.nn.Linear(32, 32), torch.nn.Identity()

    def forward(self, input_ids, positions, cache=None):
        x = self.before(self.embedding(input_ids) + self.positions(positions))
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number)
        return x @ self.embedding.weight.T


def test_a_module_whose_head_nobody_knows_has_mixed_weights_too(tmp_path) -> None:
    options = ExportOptions(weights=WeightRounding(scheme="mixed", bits=4.0, max_kl=9.0), decode_steps=4)
    result = export_module(Headless(), tmp_path / "out", ModuleFacts(max_position_embeddings=64), options=options)
    assert result.parity is not None
    assert result.parity.passed
    tensors = json.loads((tmp_path / "out" / "weights.json").read_text())["tensors"]
    assert {tensors[name]["bits"] for name in ("before.weight", "embedding.weight")} == {4}


@pytest.mark.slow
def test_experts_are_chosen_by_weights_that_are_not_rounded(tmp_path) -> None:
    source = open_exportable(save_random("qwen3_moe", tmp_path / "model"), "transformers")
    model = export_graph(source, source.tensors(torch.float32), torch.float32, 64)
    groups = roundable(model)
    assert not any(".mlp.gate." in name or "experts" in name for name in groups)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert groups[query] == (query,)
    code, output = run("export", tmp_path / "model", "-o", tmp_path / "out", "--weights", "int4", "--max-kl", "9", "-q")
    assert code == 0, output
    assert_computes_what_transformers_does(tmp_path / "out", random_model("qwen3_moe"))


def test_weights_that_are_joined_in_the_graph_have_one_width(toy_checkpoint) -> None:
    source = OwnModel(open_checkpoint(toy_checkpoint))
    groups = roundable(export_graph(source, source.checkpoint, torch.float32, 64))
    joined = tuple(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    assert [groups[name] for name in joined] == [joined] * 3
    assert len(groups) == 2 + 2 * 7  # embedding, head, and the layers' products


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["gemma3_text", "headfold", "module"])
def test_a_running_model_computes_what_the_model_does(kind, streamed, tmp_path, toy_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0 if streamed else 1 << 30)
    if kind == "module":
        module = Plain()
        source = ModuleModel(module, ModuleFacts(max_position_embeddings=64), TokenizerFiles())
    else:
        path = save_random(kind, tmp_path / "model") if kind != "headfold" else toy_checkpoint
        source = OwnModel(open_checkpoint(path)) if kind == "headfold" else open_exportable(path, "transformers")
    tokens = torch.arange(34).view(2, 17)
    model = Running(source, source.tensors(torch.float32), 32)
    logits = model(tokens).logits
    right = source.oracle(torch.float32, 32)
    for row in range(2):
        np.testing.assert_allclose(logits[row], right.answer(tokens[row].numpy()).logits, atol=1e-4)
    cache = model.new_cache(2, 17)
    for start, end in ((0, 9), (9, 14), (14, 17)):
        going_on = model(tokens[:, start:end], torch.ones(2, end, dtype=torch.long), cache).logits
        assert torch.allclose(going_on[:, -1], logits[:, end - 1], atol=1e-5)
    (hidden,) = model.enter([tokens])
    for index in range(model.count):
        assert torch.allclose(model.run_from(index, tokens, hidden), logits, atol=1e-5)
        assert not torch.allclose(model.run_from(index, tokens, 2 * hidden + 1), logits, atol=1e-2)
        hidden = model.run_layer(index, tokens, hidden)
    parts = torch.split(tokens, 1)
    for part, expected in zip(model.logits(parts), logits, strict=True):
        assert torch.allclose(part[0], expected, atol=1e-5)
    if kind == "headfold":
        assert model.head is not None
        entering = torch.cat(list(model.entering_head(parts)))
        assert torch.allclose(entering @ model.read(model.head).T, logits, atol=1e-5)
        some = dict.fromkeys(["model.layers.0.mlp.down_proj.weight", model.head], 7)
        half = RoundedTensors(source.checkpoint, forms_of(some, source.checkpoint.shapes()))
        with model.reading(half):
            for part, row in zip(model.logits(parts), tokens, strict=True):
                right = source.oracle(torch.float32, 32, half).answer(row.numpy()).logits
                np.testing.assert_allclose(part[0], right, atol=1e-4)
    name = next(name for name in source.tensors(torch.float32).shapes() if model.layer_of(name) == 1)
    with model.replaced({name: torch.zeros_like(model.read(name))}):
        assert not torch.allclose(model(tokens).logits, logits, atol=1e-2)
    assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_comes_only_where_it_computes(tied, config, memory_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0)
    checkpoint, times = memory_checkpoint(replace(config, tie_word_embeddings=tied)), [0]
    own = MemoryCheckpoint.read

    def read(checkpoint: MemoryCheckpoint, name: str) -> torch.Tensor:
        times[0] += name == "model.embed_tokens.weight"
        return own(checkpoint, name)

    monkeypatch.setattr(MemoryCheckpoint, "read", read)
    model, parts = Running(OwnModel(checkpoint), checkpoint, 32), torch.split(torch.arange(32).view(4, 8), 1)

    def read_by(run: Callable[[], object]) -> int:
        times[0] = 0
        run()
        return times[0]

    right, entering = model(parts[0]).logits, model.enter(parts)
    assert read_by(lambda: model.enter(parts)) == 1
    assert read_by(lambda: model.run_layer(1, parts[0], entering[0])) == 0
    assert read_by(lambda: model.run_from(0, parts[0], entering[0])) == (1 if tied else 0)
    assert read_by(lambda: list(model.logits(parts))) == (2 if tied else 1)
    assert read_by(lambda: list(model.entering_head(parts))) == (2 if tied else 1)
    assert torch.equal(model.run_from(0, parts[0], entering[0]), right)


@pytest.mark.parametrize("tied", [False, True])
def test_of_an_embedding_that_comes_and_goes_only_rows_of_tokens_are_made_wide(
    tied, config, memory_checkpoint, monkeypatch
) -> None:
    checkpoint, name = memory_checkpoint(replace(config, tie_word_embeddings=tied)), "model.embed_tokens.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].bfloat16()  # as shards of large models have it
    weight, form = checkpoint.read(name), forms_of({name: 4}, checkpoint.shapes(), wide_rows={name: 32})
    weights = [
        RoundedTensors(checkpoint, {}),
        RoundedTensors(checkpoint, form),
        RoundedTensors(checkpoint, form, {name: rounded(weight, 4, wide_rows=32)}),
    ]
    parts = torch.split(torch.tensor([[3, 31, 32, 90], [31, 7, 95, 3]]), 1)
    for tensors in weights:
        found, most = [], [0]

        def seen(rounding: Rounded, most: list[int] = most) -> torch.Tensor:
            most[0] = max(most[0], len(rounding.values))
            return restored(rounding)

        for size in (1 << 30, 0):  # the second one's layers, and embedding, come and go
            monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", size)
            model = Running(OwnModel(checkpoint), checkpoint, 32)
            with model.reading(tensors), monkeypatch.context() as patched:
                if model.streams:
                    patched.setattr("headfold.export.exportables.rounded.restored", seen)
                    patched.setattr("headfold.export.model.rounding.restored", seen)
                found.append(torch.cat(model.enter(parts)))
            with model.replaced({name: weight + 1}):
                found.append(torch.cat(model.enter(parts)))
        assert {stream.dtype for stream in found} == {torch.float32}
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
        assert torch.equal(found[0], tensors.read(name)[torch.cat(parts)].float())
        assert most[0] <= 6  # different tokens


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system does not say whether there is room")
def test_what_is_large_lies_in_a_file_if_there_is_room(toy_checkpoint, tmp_path, monkeypatch) -> None:
    source, rooms = OwnModel(open_checkpoint(toy_checkpoint)), list[Path]()

    def room() -> Path:
        rooms.append(tmp_path)
        return tmp_path

    Running(source, source.checkpoint, 32, room=room).new_cache(1, 8)
    assert not rooms  # it is small
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0)
    model = Running(source, source.checkpoint, 32, room=room)
    assert all((part == 0).all() for pair in model.new_cache(1, 8) for part in pair)
    assert rooms
    assert not list(tmp_path.iterdir())  # it has no name

    def full(_file: int, _start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BundleError, match=rf"{tmp_path}: .* Free 5 MiB there\."):
        model.zeros(5, 1 << 18)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_weight_that_cannot_be_held_is_named(streamed, config, memory_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0 if streamed else 1 << 30)
    checkpoint, name = memory_checkpoint(config), "model.layers.1.mlp.up_proj.weight"
    for value, dtypes, what in (
        (np.nan, {}, "holds NaN or infinity"),
        (1e5, {name: torch.float16}, r"has values up to 1e\+05, more than float16 holds\. Export with --dtype float32"),
    ):
        checkpoint.read(name)[3, 5] = value
        with pytest.raises(CheckpointError, match=f"tensor {name} {what}"):
            Running(OwnModel(checkpoint), checkpoint, 32, dtypes)(torch.arange(8)[None])


def test_gptq_of_weights_that_come_and_go_finds_the_same(toy_checkpoint, monkeypatch) -> None:
    source, tokens, found = OwnModel(open_checkpoint(toy_checkpoint)), torch.arange(128).view(4, 32), []
    for resident in (1 << 30, 0):
        monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", resident)
        model = Running(source, source.checkpoint, 32)
        names = [name for name in source.checkpoint.shapes() if name.endswith("_proj.weight")]
        entering, scales = model.enter([tokens]), dict.fromkeys(names, torch.float32)
        found.append(InMemory())
        gptq_layers(model, names, 4, tokens, [*entering], [*entering], scales, 32, Reporter(quiet=True), found[-1])
        assert model.streams == (resident == 0)
    assert len(found[0]) == 14
    for name, rounding in found[0].items():
        assert torch.equal(rounding.values, found[1][name].values)
        assert torch.equal(rounding.scales, found[1][name].scales)
