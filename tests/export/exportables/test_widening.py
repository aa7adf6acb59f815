"""Oracles of large models, whose layers are wide only while they compute, say what those of small ones do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from own_modules import Plain
from random_transformers import random_model

from headfold.export import ModuleFacts
from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.module_road.module_model import ModuleModel
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedCheckpoint, RoundedTensors
from headfold.export.model.rounding import Form

TOKENS = np.arange(3, 20)


def opened(kind: str, directory: Path) -> Exportable:
    if kind == "module":
        return ModuleModel(Plain(), ModuleFacts(max_position_embeddings=64), TokenizerFiles())
    model = random_model(kind).bfloat16()
    model.save_pretrained(directory)
    return open_exportable(directory)


def rounded(source: Exportable) -> RoundedTensors:
    tensors = source.tensors(torch.float32)
    first = (
        "layers.0.up.weight" if "layers.0.up.weight" in tensors.shapes() else "model.layers.0.self_attn.o_proj.weight"
    )
    if isinstance(source, OwnModel):
        return RoundedCheckpoint(source.checkpoint, {first: Form(4)})
    return RoundedTensors(tensors, {first: Form(4)})


@pytest.mark.parametrize("kind", ["llama", "phi3", "module"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_large_model_is_widened_layer_by_layer_and_computes_the_same(kind, stored, tmp_path, monkeypatch) -> None:
    source, answers = opened(kind, tmp_path), []
    for largest in (1 << 60, 0):
        monkeypatch.setattr("headfold.export.exportables.foreign.widening.LARGE", largest)
        oracles = [
            source.oracle(stored, 64),
            source.oracle(stored, 64, rounded(source)),
            source.reference(stored, 64, torch.float64),
        ]
        answers.append([oracle.answer(TOKENS) for oracle in oracles for _ in range(2)])
    for small, large in zip(*answers, strict=True):
        np.testing.assert_array_equal(small.logits, large.logits)
        np.testing.assert_array_equal(small.hidden_states, large.hidden_states)
    assert not np.array_equal(answers[1][0].logits, answers[1][2].logits)  # what is rounded is
