"""The nodes of mixtures of experts, and the pass that has gate and up as ONNX Runtime's kernel wants them."""

from dataclasses import fields, replace
from typing import Any

import onnx_ir as ir

from headfold.export.graph.recipes import add_weight, recipe_of, remove_unread
from headfold.plugins.experts.onnx_functions import onnxruntime_can
from headfold.plugins.experts.schema import (
    DOMAIN,
    INPUTS,
    OP_TYPE,
    QUANTIZED,
    ExpertsAttributes,
    QuantizedExpertsAttributes,
)

_ROWS = ("gate_up_weight", "gate_up_bias")


def experts_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the op, quantized or not, in order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type in {OP_TYPE, QUANTIZED}]


def alternate_experts(model: ir.Model) -> None:
    """Rows of gates, then of ups, are saved in turn: what ONNX Runtime's kernel reads."""
    for node in experts_nodes(model):
        attributes = attributes_of(node)
        wanted = replace(attributes, interleaved=1)
        if attributes.interleaved or not onnxruntime_can(wanted):
            continue
        for position in map(INPUTS.index, _ROWS):
            rows = node.inputs[position] if position < len(node.inputs) else None
            if rows is None:
                continue
            recipe = recipe_of(rows)
            if recipe is None or rows.shape is None:
                raise RuntimeError(f"{rows.name}, experts of {node.name}, is no weight")
            shape = [int(dim) for dim in rows.shape]  # type: ignore[arg-type]  # of a weight: numbers
            recipe = replace(recipe, alternating=True)
            known = model.graph.initializers.get(recipe.name)
            node.replace_input_with(position, known or add_weight(model, recipe, shape, rows.dtype))
            remove_unread(model, [rows])
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def attributes_of(node: ir.Node) -> ExpertsAttributes:
    """A node's attributes; what it does not say has the op's default."""
    kind = QuantizedExpertsAttributes if node.op_type == QUANTIZED else ExpertsAttributes
    given: dict[str, Any] = {
        field.name: node.attributes[field.name].value for field in fields(kind) if field.name in node.attributes
    }
    return kind(**given)
