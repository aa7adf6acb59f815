"""Faults in mixtures of experts, planted in finished bundles: those that change no number too are caught, and named."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from random_transformers import save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.graph.experts import experts_nodes
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import load_model
from headfold.export.model.rounding import Form
from headfold.export.parity.exact.experts import prove_experts
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.products import round_weights, roundable
from headfold.runtime.manifest import MODEL, read_manifest

QUIET = Reporter(quiet=True)
Edit = Callable[[ir.Model], None]


@dataclass(frozen=True)
class Made:
    """An unproven bundle, what it was made of, and the graph traced anew."""

    bundle: Path
    source: Exportable
    again: ir.Model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Made]:
    """Of a model type, once."""

    @cache
    def of(model_type: str) -> Made:
        path = tmp_path_factory.mktemp(model_type)
        source = open_exportable(save_random(model_type, path / "model"), "transformers")
        capacity = export_bundle(source, path / "bundle", ExportOptions(verify=False), QUIET).manifest.cache.capacity
        again = export_graph(source, source.tensors(torch.float32), torch.float32, capacity)
        return Made(path / "bundle", source, again)

    return of


def attribute(name: str, value: int | float | str) -> Edit:
    def edit(model: ir.Model) -> None:
        experts_nodes(model)[1].attributes[name] = ir.convenience.convert_attribute(name, value)

    return edit


def other_weights(model: ir.Model) -> None:
    """The second has the first one's."""
    first, second, *_ = experts_nodes(model)
    second.replace_input_with(3, first.inputs[3])  # down_weight


def constant(op_type: str, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Of the last node of that kind that has one there."""

    def edit(model: ir.Model) -> None:
        for node in reversed(list(model.graph)):
            value = node.inputs[index] if node.op_type == op_type and len(node.inputs) > index else None
            if value is not None and value.const_value is not None and value.const_value.size == 1:
                tensor = ir.tensor(change(value.const_value.numpy()), name="changed")
                changed = ir.Value(name="changed", type=value.type, shape=value.shape, const_value=tensor)
                model.graph.register_initializer(changed)
                node.replace_input_with(index, changed)
                return
        raise AssertionError(f"no {op_type} has a constant")

    return edit


FAULTS: dict[str, tuple[str, Edit, str]] = {
    "one expert more, of no weight": ("gpt_oss", attribute("k", 3), "k is 3, not 2"),
    "a limit that nothing reaches": ("gpt_oss", attribute("limit", 700.0), "limit is 700.0, not 7.0"),
    "another slope": ("gpt_oss", attribute("alpha", 1.7), "alpha is 1.7"),
    "no one is added": ("gpt_oss", attribute("beta", 0.0), "beta is 0.0, not 1.0"),
    "rows in another order": ("gpt_oss", attribute("interleaved", 0), "interleaved is 0, not 1"),
    "another activation": ("qwen3_moe", attribute("activation", "gelu"), "activation is gelu, not silu"),
    "another layer's weights": ("qwen3_moe", other_weights, "down_weight is model.layers.0"),
    "one more is asked of the router": ("qwen3_moe", constant("TopK", 1, lambda k: k + 1), "chosen in another way"),
    "groups that are left out cost nothing": ("dots1", constant("TopK", 1, lambda k: k + 1), "chosen in another way"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=pytest.mark.slow if FAULTS[x][0] == "dots1" else ()) for x in FAULTS]
)
def test_a_fault_is_named(fault, made) -> None:
    model_type, edit, message = FAULTS[fault]
    model = load_model(made(model_type).bundle / MODEL)
    assert prove_experts(model, made(model_type).again).passed
    edit(model)
    found = prove_experts(model, made(model_type).again)
    assert not found.passed
    assert message in found.note


def test_the_proof_of_a_bundle_has_it(made, tmp_path) -> None:
    bundle, source = made("gpt_oss").bundle, made("gpt_oss").source
    manifest = read_manifest(bundle)
    assert verify_bundle(bundle, source, manifest, 4, QUIET).passed
    model = ir.load(bundle / MODEL)
    attribute("k", 3)(model)
    ir.save(model, tmp_path / MODEL, external_data=f"{MODEL}.data")
    report = verify_bundle(tmp_path, source, manifest, 4, QUIET)
    assert [check.name for check in report.checks if not check.passed] == ["experts and their routing"]


@pytest.mark.parametrize(
    "fault",
    [
        "mlp.gate.weight",
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param("o_proj.weight", marks=pytest.mark.slow),
    ],
)
def test_routing_is_proven_beside_rounded_products(fault, tmp_path) -> None:
    """A layer that has another's router, or another's product before it, is seen however the numbers are stored."""
    source = open_exportable(save_random("qwen3_moe", tmp_path / "model"), "transformers")
    tensors = source.tensors(torch.float32)
    model, again = (export_graph(source, tensors, torch.float32, 64) for _ in range(2))
    round_weights(model, RoundedTensors(tensors, dict.fromkeys(roundable(model), Form(8))))
    if fault is not None:
        first, second, *_ = (
            node
            for node in model.graph
            if len(node.inputs) > 1 and node.inputs[1] is not None and fault in (node.inputs[1].name or "")
        )
        second.replace_input_with(1, first.inputs[1])
    assert prove_experts(model, again).passed == (fault is None)
