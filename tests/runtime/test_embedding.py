"""Embeddings are transformers' last hidden states, pooled; proven as the logits are, and only where they were asked for."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_transformers import random_model

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.engine.lowering import lower
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.own import OwnMaster
from headfold.export.progress import Reporter
from headfold.runtime import BundleError, CapacityError, InputError, Model, load
from headfold.runtime.errors import VerificationError
from headfold.runtime.manifest import MODEL
from headfold.runtime.measuring.embedding import pooled

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module", params=["qwen3", "olmo2"])  # of a table of ours, and by way of transformers
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Any]]:
    """A bundle with hidden states, proven, and transformers' model of the same weights."""
    path = tmp_path_factory.mktemp(request.param)
    theirs = random_model(request.param, vocab_size=300, max_position_embeddings=700)
    theirs.save_pretrained(path / "model")
    options = ExportOptions(hidden_states=True, decode_steps=4)
    export_bundle(open_exportable(path / "model"), path / "bundle", options, QUIET)
    with load(path / "bundle", threads=1) as model:
        yield model, theirs


def last_hidden_state(theirs: Any, ids: Any) -> np.ndarray:
    return theirs.model(torch.tensor(np.asarray(ids))[None]).last_hidden_state[0].numpy()


@pytest.mark.parametrize("length", [1, 9, 600])  # the last in parts
def test_they_are_transformers_pooled(length, both) -> None:
    model, theirs = both
    ids = np.random.default_rng(length).integers(0, 300, length)
    states = last_hidden_state(theirs, ids).astype(np.float64)
    for pooling, wanted in (("mean", states.mean(0)), ("last", states[-1])):
        np.testing.assert_allclose(model.embed(ids, pooling=pooling), wanted, atol=2e-4)
        vector = model.embed(ids, pooling=pooling, normalize=True)
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=2e-4)


def test_a_list_gives_a_list_and_generation_is_what_it_was(both) -> None:
    model, theirs = both
    prompts = [[5, 6, 7], [8] * 20]
    every = model.embed(prompts)
    assert every.shape == (2, theirs.config.hidden_size)
    assert every.dtype == np.float32
    np.testing.assert_array_equal(every[1], model.embed(prompts[1]))
    wanted = theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert model.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids == wanted[0, 3:].tolist()


def test_the_proof_is_of_them_too(both) -> None:
    report = json.loads((both[0].bundle / "parity.json").read_text())
    names = {check["name"] for check in report["checks"]}
    steps = {name.removesuffix(", cache") for name in names if name.endswith(", cache")}
    assert {f"{step}, hidden states" for step in steps} <= names
    assert len(steps) > 3


def test_a_graph_that_forgets_the_norm_is_refused(tmp_path, monkeypatch) -> None:
    def without_norm(self: OwnMaster, input_ids: Any, attention_mask: Any, cache: Any) -> Any:
        output = self.decoder(input_ids, attention_mask, cache, last_only=True)
        return output.logits, output.cache, [*output.hidden_states, output.hidden_states[-1] * 1.0]

    random_model("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(OwnMaster, "forward", without_norm)
    with pytest.raises(VerificationError, match="hidden states"):
        export_bundle(open_exportable(tmp_path / "model"), tmp_path / "b", ExportOptions(hidden_states=True), QUIET)


def test_in_float16(make_toy) -> None:
    """Right within what half precision loses."""
    toy = make_toy(dtype="float16", hidden_states=True)
    with load(toy.path, threads=1) as model:
        states = toy.decoder(torch.tensor([[5, 6, 7]]), normed=True).normed[0].numpy()
        np.testing.assert_allclose(model.embed([5, 6, 7], pooling="last"), states[-1], atol=3e-2)


def test_what_cannot_be_is_one_line(make_toy) -> None:
    with load(make_toy().path, threads=1) as plain, pytest.raises(InputError, match="--hidden-states"):
        plain.embed([1, 2])
    with load(make_toy(hidden_states=True).path, threads=1) as model:
        for wrong, match in ((dict(texts=[]), "empty"), (dict(texts=[1], pooling="max"), "pooling is 'max'")):
            with pytest.raises(InputError, match=match):
                model.embed(**wrong)
        with pytest.raises(CapacityError):
            model.embed([1] * 65)
        assert model.embed("the quick brown fox").shape == (model.manifest.hidden_size,)


def test_what_is_no_number_is_told() -> None:
    with pytest.raises(BundleError, match="NaN or infinite"):
        pooled([np.array([[np.nan, 1]], np.float32)], "mean", True)
    assert pooled([np.zeros((2, 3), np.float32)], "mean", True).tolist() == [0, 0, 0]


def test_an_engine_is_built_without_them(make_toy) -> None:
    outputs = [
        [value.name for value in lower(make_toy(hidden_states=given).path / MODEL, "native", 24).graph.outputs]
        for given in (False, True)
    ]
    assert outputs[0] == outputs[1]


def test_a_manifest_that_says_otherwise_than_the_graph_is_refused(make_toy, tmp_path) -> None:
    path = shutil.copytree(make_toy(hidden_states=True).path, tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    (spec,) = (spec for spec in manifest["outputs"] if spec["name"] == "hidden_states")
    for size, match in ((spec["shape"][2] + 1, "hidden_states is not the manifest's"), ("hidden", "has no size")):
        spec["shape"][2] = size
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=match):
            load(path, threads=1)


def test_a_bundle_is_as_it_was_unless_asked(make_toy) -> None:
    manifest = Path(make_toy().path / "manifest.json").read_text()
    assert "hidden_states" not in manifest
