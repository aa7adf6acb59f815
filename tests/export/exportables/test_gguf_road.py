"""GGUF files of architectures that headfold has no table of come out equal to the model of transformers that they were written of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_of_transformers import Tensors, gguf_tensors, write_gguf
from random_transformers import random_model
from transformers import PreTrainedModel

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.runtime import load
from headfold.runtime.errors import HeadfoldError


def gemma2() -> PreTrainedModel:
    """Which layers have its window is in no metadata, nor what they divide by: in llama.cpp the size of a head."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return random_model("gemma2", layer_types=types, query_pre_attn_scalar=32)


def gemma3() -> PreTrainedModel:
    """As gemma2, but only one layer of six is without a window."""
    return random_model("gemma3_text", layer_types=["sliding_attention"] * 3, query_pre_attn_scalar=32)


def qwen3_moe() -> PreTrainedModel:
    """The experts' size is not in what transformers reads, and llama.cpp always divides by the sum of the chosen."""
    return random_model("qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, float]]] = {
    "gemma2": (
        gemma2,
        {"attention__sliding_window": 9, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (gemma3, {"attention__sliding_window": 9}),
    "qwen3moe": (qwen3_moe, {"expert_count": 6, "expert_used_count": 2}),
}


def written(path: Path, architecture: str, change: Callable[[Tensors], object] = len, **metadata: float) -> Path:
    make, more = MODELS[architecture]
    tensors = gguf_tensors(model := make(), architecture)
    change(tensors)
    return write_gguf(path / "model.gguf", model, architecture, tensors, **more | metadata)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.slow if name in ("qwen3moe", "gemma2") else ()) for name in MODELS],
)
def test_is_the_model_that_was_written(architecture, tmp_path) -> None:
    source = open_exportable(written(tmp_path, architecture))
    assert source.road == "transformers"
    result = export_bundle(source, tmp_path / "bundle", ExportOptions(decode_steps=4), Reporter(quiet=True))
    assert result.parity is not None
    assert result.parity.passed
    backend, prompt = load(tmp_path / "bundle").backend, np.random.default_rng(0).integers(3, 300, 21)
    logits = backend.prefill(backend.new_cache(1, 32), 0, prompt)
    expected = MODELS[architecture][0]()(torch.tensor(prompt)[None]).logits[0, -1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "model_type", "layers"), [("gemma2", "gemma2", 46), ("gemma3", "gemma3_text", 62)]
)
def test_the_largest_gemmas_divide_by_another_size_than_their_heads(architecture, model_type, layers, tmp_path) -> None:
    model = random_model(model_type, num_hidden_layers=layers, hidden_size=24, intermediate_size=8, layer_types=None)
    _, metadata = MODELS[architecture]
    path = write_gguf(tmp_path / "27b.gguf", model, architecture, gguf_tensors(model, architecture), **metadata)
    facts = open_exportable(path).facts
    assert {layer.scale for layer in facts.layers} == {(24 / 6) ** -0.5}  # hidden size and heads, and not heads of 32


NORM = "blk.1.attn_norm.weight"
BAD: dict[str, tuple[Callable[[Tensors], object], dict[str, float], str]] = {
    "a scaled RoPE": (len, {"rope__scaling__factor": 8.0}, "does not read its metadata gemma3.rope.scaling.factor"),
    "a missing tensor": (lambda t: t.pop(NORM), {}, "has no model.layers.1.input_layernorm.weight"),
    "a tensor of another model": (lambda t: t.update(rope_freqs=np.ones(4)), {}, "tensor rope_freqs is none of"),
    "a tensor of another shape": (lambda t: t.update({NORM: np.ones(7, "f4")}), {}, "is [7], not [96]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_nothing(case, tmp_path) -> None:
    change, metadata, message = BAD[case]
    path = written(tmp_path, "gemma3", change, **metadata)
    with pytest.raises(HeadfoldError) as caught:
        export_bundle(open_exportable(path), tmp_path / "bundle", ExportOptions(verify=False), Reporter(quiet=True))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_an_architecture_whose_tensors_transformers_does_not_know_is_named(tmp_path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gemma3(), "mistral", {})
    with pytest.raises(HeadfoldError, match=r"transformers cannot read its tensors: .*mistral"):
        open_exportable(path)


def test_an_unknown_architecture_is_named(tmp_path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gemma3(), "rwkv6", {})
    with pytest.raises(HeadfoldError, match="GGUF model with architecture rwkv6 is not supported"):
        open_exportable(path)
