"""Mixtures of experts come out of transformers' road proven, in ONNX Runtime's kernel where it can; gates are tried on numbers."""

import onnx_ir as ir
import pytest
import torch
from random_transformers import save_random
from torch import Tensor, nn

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.transformers_road.experts import _OWN, learn_gates
from headfold.export.graph.experts import attributes_of, experts_nodes
from headfold.export.graph.recipes import WeightRecipe, recipe_of
from headfold.export.progress import Reporter
from headfold.plugins.experts.schema import DOMAIN, OP_TYPE, ExpertsAttributes
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import MODEL


@pytest.mark.parametrize(
    ("model_type", "attributes", "recipe"),
    [
        ("qwen3_moe", ExpertsAttributes(2, interleaved=1), {"alternating": True}),
        pytest.param(
            "gpt_oss",
            ExpertsAttributes(2, alpha=1.702, beta=1.0, limit=7.0, interleaved=1),
            {"transposed": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_is_proven_in_onnxruntimes_kernel(model_type, attributes, recipe, tmp_path) -> None:
    source = open_exportable(save_random(model_type, tmp_path / "model"), "transformers")
    result = export_bundle(source, tmp_path / "bundle", ExportOptions(decode_steps=4), Reporter(quiet=True))
    assert result.parity is not None
    assert result.parity.passed
    graph = ir.load(tmp_path / "bundle" / MODEL)
    nodes = experts_nodes(graph)
    assert len(nodes) == 3
    for layer, node in enumerate(nodes):
        for name, value in vars(attributes_of(node)).items():
            assert value == pytest.approx(getattr(attributes, name)), name
        weight = node.inputs[2]
        assert weight is not None
        assert recipe_of(weight) == WeightRecipe((f"model.layers.{layer}.mlp.experts.gate_up_proj",), **recipe)
    body = graph.functions[DOMAIN, OP_TYPE, ""]
    assert [(node.domain, node.op_type) for node in body] == [("com.microsoft", "MoE")]


def test_a_recipe_alternates_rows_and_transposes_the_last_axes() -> None:
    weight = torch.arange(2 * 3 * 4).reshape(2, 3, 4)  # [E, H, 2I]
    made = WeightRecipe(("w",), transposed=True, alternating=True).make(lambda _: weight)
    assert made.shape == WeightRecipe(("w",), transposed=True).shape({"w": (2, 3, 4)}) == (2, 4, 3)
    assert torch.equal(made, weight.mT[:, [0, 2, 1, 3]])
    bias = torch.arange(8).reshape(2, 4)  # [E, 2I]
    assert torch.equal(WeightRecipe(("b",), alternating=True).make(lambda _: bias), bias[:, [0, 2, 1, 3]])


class Experts(nn.Module):
    """As the decorator of transformers 5.17 leaves a class; later ones add `has_post_expert_norm`."""

    has_gate, is_concatenated = True, True

    def __init__(self, activation, **changes) -> None:
        super().__init__()
        self.activation = activation
        for name, value in changes.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.activation(gate) * up


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.SiLU(), ExpertsAttributes(1)),
        (nn.GELU(), ExpertsAttributes(1, "gelu")),
        (nn.GELU("tanh"), ExpertsAttributes(1, "gelu_tanh")),
    ],
)
def test_gates_are_what_they_compute(activation, expected) -> None:
    module = Experts(activation)
    learn_gates(nn.ModuleDict({"experts": module}))
    assert getattr(module, _OWN) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": nn.ReLU()}, "gate of its own"),
        ({"activation": lambda x: nn.functional.silu(x.clamp(max=3))}, "gate of its own"),
        ({"activation": nn.SiLU(), "has_gate": False}, "without a gate"),
        ({"activation": nn.SiLU(), "has_post_expert_norm": True}, "a norm after"),
    ],
)
def test_what_the_op_has_not_is_refused_by_name(changes, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        learn_gates(nn.ModuleDict({"layer": nn.ModuleDict({"experts": Experts(**changes)})}))
    assert caught.value.where == "layer.experts"
