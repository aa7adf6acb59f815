"""Parity finds what it is for: a wrong weight, a lost window, another RoPE, a NaN. Each names check and layer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from proof_cases import ignored_padding, swapped_caches

from headfold.export.exportables.oracle import DecoderOracle
from headfold.export.exportables.own import OwnModel, facts_of
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import attach_weights, save_model
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.parity.compare import Subject, verify_graph
from headfold.export.parity.probes import make_prompts, pad
from headfold.export.parity.report import ParityReport, agreed, compare_logits
from headfold.export.parity.tolerances import Precision
from headfold.export.progress import Reporter

CAPACITY = 64


@pytest.fixture
def verified(memory_checkpoint, tmp_path) -> Callable[..., ParityReport]:
    """Exports a model, lets a fault be planted in the graph or the weights, and compares with the right one."""

    def verify(
        config: ModelConfig,
        dtype: str = "float32",
        graph: Callable[[ir.Model], Any] = lambda model: None,
        weights: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
        exported: ModelConfig | None = None,
    ) -> ParityReport:
        checkpoint = memory_checkpoint(config)
        torch_dtype = getattr(torch, dtype)
        rounded = {name: tensor.clone().to(torch_dtype).float() for name, tensor in checkpoint.tensors.items()}
        changed = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        weights(changed)
        checkpoint = replace(checkpoint, config=exported or config, tensors=changed)
        source = OwnModel(checkpoint)
        model = export_graph(source, checkpoint, torch_dtype, CAPACITY)
        attach_weights(model, checkpoint, source.tables(torch_dtype, CAPACITY), allow_nan=True)
        graph(model)
        save_model(model, tmp_path / "model.onnx", lambda name, size: None)

        def load() -> Decoder:
            decoder = Decoder(config, CAPACITY).eval().requires_grad_(False)
            decoder.load_state_dict(rounded)
            cos, sin = decoder.cos_cache.to(torch_dtype).float(), decoder.sin_cache.to(torch_dtype).float()
            decoder.cos_cache, decoder.sin_cache = cos, sin
            return decoder

        def oracle(arithmetic: torch.dtype = torch.float32) -> DecoderOracle:
            return DecoderOracle(load().to(arithmetic))

        facts, precision = facts_of(config), Precision("onnxruntime", dtype)
        subject = Subject(tmp_path / "model.onnx", facts, precision, False, CAPACITY, None, oracle, oracle)
        return verify_graph(subject, make_prompts(config.vocab_size, 12, None), 4, Reporter(quiet=True))

    return verify


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_right_graph_passes(dtype, config, verified) -> None:
    report = verified(config, dtype)
    assert report.passed, report.failure()
    assert report.first_bad_layer is None
    whole = ("prefill", "decode", "chunked prefill", "ragged batch, right padding", "ragged batch, left padding")
    names = {f"{name}{cache}" for name in whole for cache in ("", ", cache")}
    places = ("a prompt", "at the end of the capacity", "rows of unequal length")
    expected = names | {"greedy tokens"} | {f"each layer alone, {place}" for place in places}
    expected |= {f"{name}, in float16" for name in names if dtype == "float16"}
    assert {check.name for check in report.checks} == expected
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    assert report.summary()["top1_agreement"] == (1.0 if dtype != "float16" else pytest.approx(1.0, abs=0.2))
    assert report.oracle == "headfold's own decoder in PyTorch"


def test_a_wrong_weight_is_found_in_its_layer(config, verified) -> None:
    report = verified(config, weights=lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    assert not report.passed
    assert report.first_bad_layer == 1
    assert "first bad layer 1" in report.failure()


def test_nan_fails(config, verified) -> None:
    report = verified(config, weights=lambda t: t["model.layers.2.mlp.down_proj.weight"][0].fill_(float("nan")))
    assert not report.passed
    assert report.first_bad_layer == 2


def test_what_is_no_number_is_agreed_only_where_neither_is_one() -> None:
    nan, inf = np.nan, np.inf
    expected, actual = np.array([nan, inf, -inf, nan, 1]), np.array([nan, inf, nan, 2, nan])
    left, right = agreed(expected, actual)
    np.testing.assert_array_equal(left, [0, 0, 0, nan, 1])
    np.testing.assert_array_equal(right, [0, 0, 0, 2, nan])
    finite = np.ones(5)
    assert agreed(finite, actual)[1] is actual


def test_a_lost_window_fails(config, verified) -> None:
    windowed = replace(config, sliding_window=3, sliding_layers=(1,))
    report = verified(windowed, exported=config)
    assert not report.passed
    assert report.first_bad_layer == 1


def attention(**attributes: int) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "GroupedQueryAttention":
                for name, value in attributes.items():
                    node.attributes[name] = ir.AttrInt64(name, value)

    return change


def test_a_wrong_rope_pairing_fails(config, verified) -> None:
    report = verified(config, graph=attention(rotary_interleaved=1))
    assert not report.passed
    assert report.first_bad_layer == 0


def test_swapped_caches_fail(config, verified) -> None:
    report = verified(config, graph=lambda model: swapped_caches(model, config))
    failing = {check.name for check in report.checks if not check.passed}
    assert "decode" in failing
    assert "prefill" not in failing  # a new cache is empty: only steps that have a past can show it


def test_padding_that_is_not_understood_fails(config, verified) -> None:
    """A graph that takes every column of the mask for a token is right alone, and wrong in a batch."""
    report = verified(config, graph=lambda model: ignored_padding(model, config))
    failing = {check.name for check in report.checks if not check.passed}
    assert {"ragged batch, left padding", "ragged batch, right padding"} <= failing
    assert not {"prefill", "decode", "chunked prefill"} & failing


def test_agreement_of_logits_by_its_definition() -> None:
    expected = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]], np.float32)  # the second row is padding
    actual = np.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0], [1.0, 3.0, 0.0]], np.float32)
    cosine, kl, top1 = compare_logits(expected, actual)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (expected[2].astype(float), actual[2].astype(float)))
    assert kl == pytest.approx((p * np.log(p / q)).sum())
    assert cosine == pytest.approx(6 / 10)
    assert top1 == 0.5


def test_padding_sides() -> None:
    prompts = [np.array([1, 2, 3]), np.array([4])]
    ids, mask = pad(prompts, "left")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad(prompts, "right")[0].tolist() == [[1, 2, 3], [4, 0, 0]]


def test_a_report_is_plain_json(config, verified, tmp_path: Path) -> None:
    import json

    content = json.loads(json.dumps(verified(config).to_json()))
    assert content["passed"] is True
    assert content["first_divergent_token"] is None
    assert len(content["layers"]) == config.num_hidden_layers
