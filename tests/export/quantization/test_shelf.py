"""A large model's layers are rounded once, though the export is killed between them; and never taken for those of something else."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from block_models import CONFIG
from random_transformers import save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import rounded
from headfold.export.progress import Reporter
from headfold.export.publishing import unfinished
from headfold.export.quantization import gptq
from headfold.export.quantization.rounding import WeightRounding
from headfold.export.quantization.shelf import Shelf, digest_of, remembered
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import WeightsScheme

# Exports a model as if it were large, and dies before a product is rounded when so many have been
_DYING = """
import os, sys
from headfold.export.cli import main
from headfold.export.exportables.foreign import widening
from headfold.export.quantization import gptq
widening.LARGE, left, original = 0, int(sys.argv[1]), gptq.gptq
def counted(*arguments):
    global left
    left -= 1
    return original(*arguments) if left >= 0 else os._exit(137)
gptq.gptq = counted
main(sys.argv[2:])
"""
_PRODUCTS = 7  # of a layer


@pytest.fixture
def source(tmp_path) -> Path:
    torch.manual_seed(0)
    weights = Decoder(CONFIG).requires_grad_(False).state_dict()
    save_hf(tmp_path / "source", MemoryCheckpoint(tmp_path, CONFIG, weights), torch.float32)
    return tmp_path / "source"


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 160, 4096))
    return path


def export(source: Path, output: Path, tokens: Path, scheme: WeightsScheme = "int4") -> None:
    bits = 4.0 if scheme == "mixed" else None
    rounding = WeightRounding(scheme=scheme, bits=bits, max_kl=100, data=(str(tokens),))
    options = ExportOptions(weights=rounding, verify=False, capacity=64)
    export_bundle(open_exportable(source), output, options, Reporter(quiet=True))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_export_that_was_killed_goes_on_with_its_layers(source, tokens, tmp_path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "bundle"
    options = ["--weights", "int4", "--max-kl", "100", "--data", tokens, "--no-verify", "--capacity", "64", "-q"]
    command = [sys.executable, "-c", _DYING, str(_PRODUCTS + 3), "export", source, "-o", output, *options]
    assert subprocess.run(command, check=False).returncode == 137
    assert not output.exists()
    rounding, calls = gptq.gptq, []

    def counted(*arguments):
        calls.append(arguments)
        return rounding(*arguments)

    monkeypatch.setattr(gptq, "gptq", counted)
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0)
    export(source, output, tokens)
    assert len(calls) == _PRODUCTS  # of the second layer, in the middle of which it was killed
    assert names(output.parent) == ["bundle"]
    export(source, tmp_path / "out" / "whole", tokens)
    assert len(calls) == 3 * _PRODUCTS  # nothing is left of a finished one
    for file in ("model.onnx.data", "weights.json"):
        assert (output / file).read_bytes() == (tmp_path / "out" / "whole" / file).read_bytes()


@pytest.mark.slow
def test_nor_is_what_was_measured_and_the_head(source, tokens, tmp_path, monkeypatch) -> None:
    """Killed in the first layer, the head behind it."""
    output = tmp_path / "bundle"
    options = ["--weights=mixed", "--bits=4", "--max-kl=100", "--data", tokens, "--no-verify", "--capacity=64", "-q"]
    command = [sys.executable, "-c", _DYING, "3", "export", source, "-o", output, *options]
    assert subprocess.run(command, check=False).returncode == 137
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0)
    export(source, tmp_path / "whole", tokens, "mixed")
    for name in ("sensitivities", "gptq_head"):
        monkeypatch.setattr(f"headfold.export.quantization.rounding.{name}", lambda *_: pytest.fail("it lies there"))
    export(source, output, tokens, "mixed")
    for file in ("model.onnx.data", "weights.json"):
        assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    with pytest.raises(pytest.fail.Exception):  # nothing is left
        export(source, tmp_path / "again", tokens, "mixed")


def test_what_was_measured_of_something_else_is_not_taken(tmp_path) -> None:
    weights = {"a": torch.randn(4, 64), "b": torch.randn(8, 64)}

    def costs(weights: dict[str, torch.Tensor], number: float) -> float:
        digest = digest_of(MemoryCheckpoint(tmp_path, CONFIG, weights))
        return remembered(tmp_path, [digest], lambda: {("a", "b"): {0: number, 32: float("inf")}})["a", "b"][0]

    assert costs(weights, 0.1) == costs(weights, 0.2) == 0.1
    assert costs(weights | {"b": weights["b"] + 1}, 0.3) == 0.3
    assert costs({"b": weights["a"], "a": weights["b"]}, 0.4) == 0.4
    assert costs({name: weight.half() for name, weight in weights.items()}, 0.5) == 0.5
    for file in tmp_path.glob("*.json"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(BundleError, match="what weights were measured to cost is damaged"):
        costs(weights, 0.6)


def test_a_large_model_in_four_bits_head_and_all_is_the_same(source, tokens, tmp_path, monkeypatch) -> None:
    for name, large in (("in memory", 1 << 40), ("on the disk", 0)):
        monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", large)
        export(source, tmp_path / name, tokens, "mixed")
    record = json.loads((tmp_path / "on the disk" / "weights.json").read_text())
    assert {tensor["bits"] for tensor in record["tensors"].values()} == {4}
    assert record == json.loads((tmp_path / "in memory" / "weights.json").read_text())


def test_layers_that_were_made_from_something_else_are_not_taken(tmp_path) -> None:
    weights = {"a": torch.randn(4, 64), "b": torch.randn(8, 64)}
    layer = {name: rounded(weight, 4) for name, weight in weights.items()}

    def shelf(made_from: bytes, *before: dict[str, torch.Tensor]) -> Shelf:
        made = Shelf(tmp_path, 4, [made_from])
        for others in before:
            made.next_layer(others)
        return made

    first = shelf(b"text", weights)
    assert not first.next_layer(weights)
    first.put(layer)
    found = shelf(b"text", weights)
    assert not found
    assert found.next_layer(weights)
    assert found.keys() == layer.keys()
    for name, rounding in found.items():
        assert torch.equal(rounding.values, layer[name].values)
        assert torch.equal(rounding.scales, layer[name].scales)
    assert not shelf(b"other text", weights).next_layer(weights)
    assert not shelf(b"text", weights).next_layer(weights | {"b": weights["b"] + 1})
    assert not shelf(b"text", weights | {"a": -weights["a"]}).next_layer(weights)  # the layer before is another
    assert not shelf(b"text").next_layer(weights)  # there is none before


def test_a_damaged_layer_is_one_line(tmp_path) -> None:
    weights = {"a": torch.randn(4, 64)}
    shelf = Shelf(tmp_path, 4, [b""])
    shelf.next_layer(weights)
    shelf.put({"a": rounded(weights["a"], 4)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BundleError, match="a rounded layer is damaged"):
        Shelf(tmp_path, 4, [b""]).next_layer(weights)


@pytest.mark.parametrize("other", [{"b": torch.ones(4, 64)}, {"a": torch.ones(4, 32)}])
def test_a_layer_of_other_weights_is_refused(other, tmp_path) -> None:
    weights, shelf = {"a": torch.zeros(4, 64)}, Shelf(tmp_path, 4, [b""])
    shelf.next_layer(weights)
    shelf.put({name: rounded(weight, 4) for name, weight in other.items()})
    with pytest.raises(BundleError, match="a rounded layer is another's"):
        Shelf(tmp_path, 4, [b""]).next_layer(weights)


def test_layers_of_a_configuration_that_computes_something_else_are_not_taken(tokens, tmp_path, monkeypatch) -> None:
    """What enters the first layer, and all weights, are the same."""
    monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", 0)
    first, second = (tmp_path / name for name in ("first", "second"))
    save_random("granite", first, vocab_size=160, residual_multiplier=0.5)
    shutil.copytree(first, second)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"residual_multiplier": 1.5}))
    rounding, calls, limits = gptq.gptq, [0], [0]

    def counted(*arguments):
        calls[0] += 1
        if calls[0] == limits[0]:
            raise KeyboardInterrupt
        return rounding(*arguments)

    monkeypatch.setattr(gptq, "gptq", counted)
    # Of three layers, six products each: those with whole blocks
    for source, limit, expected in ((first, 10, 10), (second, 14, 14), (first, 0, 12)):
        calls[0], limits[0] = 0, limit
        with suppress(KeyboardInterrupt):
            export(source, tmp_path / "out", tokens)
        assert calls[0] == expected


def test_what_is_unfinished_stays_until_one_ends_well(tmp_path) -> None:
    target = tmp_path / "bundle"
    for ending in (KeyboardInterrupt, OSError):
        with suppress(ending), unfinished(target) as make:
            place = make()
            (place / "layer").write_text("1")
            raise ending
        assert (place / "layer").is_file()
    with unfinished(target) as make, ExitStack() as other:
        assert make() == make() == place
        make_too = other.enter_context(unfinished(target))
        with pytest.raises(BlockingIOError):
            make_too()
    assert names(tmp_path) == []
