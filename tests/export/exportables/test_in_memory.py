"""A model object becomes a bundle: what was changed in memory is what is exported, and the object stays as it was."""

import numpy as np
import pytest
import torch
from random_transformers import random_model

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.transformers_road.in_memory import transformers_in_memory
from headfold.export.progress import Reporter
from headfold.runtime import load


@pytest.mark.slow
def test_a_changed_model_is_exported_as_it_is(tmp_path) -> None:
    model = random_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.3  # as a merged adapter would
    before = {name: x.clone() for name, x in model.state_dict().items()}
    options = ExportOptions(decode_steps=4)
    result = export_bundle(transformers_in_memory(model, "tuned"), tmp_path / "bundle", options, Reporter(quiet=True))
    assert result.parity is not None
    assert result.parity.passed
    assert result.manifest.source == "tuned"
    backend, prompt = load(tmp_path / "bundle").backend, np.arange(3, 20)
    expected = model(torch.tensor(prompt)[None]).logits[0, -1]
    np.testing.assert_allclose(backend.prefill(backend.new_cache(1, 32), 0, prompt), expected, atol=1e-4)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
