"""Memory of mapped weights is given back without a change to what they say, and nobody else's memory is touched."""

import numpy as np
import pytest
import torch
from random_transformers import save_random
from safetensors.torch import load_file, save_file

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.foreign.mapped import MappedFiles
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.runtime.errors import CheckpointError


def test_what_was_given_back_reads_as_before(tmp_path) -> None:
    expected = {name: torch.arange(n, dtype=torch.float32) for name, n in {"a": 3, "b": 70_000, "c": 5}.items()}
    save_file(expected, tmp_path / "weights.safetensors")
    mapped = load_file(tmp_path / "weights.safetensors")
    files = MappedFiles()
    for tensor in (*mapped.values(), *(own := {name: x.clone() for name, x in expected.items()}).values()):
        files.give_back(tensor)
    for name, tensor in expected.items():
        assert torch.equal(mapped[name], tensor)
        assert torch.equal(own[name], tensor)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "float16")])
def test_weights_are_cast_from_how_they_are_stored(stored, dtype, tmp_path) -> None:
    path = save_random("qwen2", tmp_path / "model", tie_word_embeddings=False)
    content = {name: x.to(getattr(torch, stored)) for name, x in load_file(path / "model.safetensors").items()}
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    source = open_exportable(path, "transformers")
    tensors = source.tensors(getattr(torch, dtype))
    assert set(tensors.shapes()) == set(content)
    for name, expected in content.items():
        np.testing.assert_array_equal(tensors.read(name).float(), expected.float())


def test_a_value_too_large_for_16_bits_is_named(tmp_path) -> None:
    path = save_random("qwen2", tmp_path / "model")
    content = load_file(path / "model.safetensors")
    content["model.norm.weight"][7] = 1e5
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    source = open_exportable(path, "transformers")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values up to 1e.05, more than float16 holds"):
        export_bundle(source, tmp_path / "bundle", ExportOptions(dtype="float16", verify=False), Reporter(quiet=True))
