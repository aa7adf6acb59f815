"""The passes of mixtures of experts: gate and up as ONNX Runtime's kernel wants them, and the op's body."""

from dataclasses import fields, replace
from typing import Any

import onnx
import onnx_ir as ir

from headfold.export.graph.bodies import set_body
from headfold.export.graph.recipes import add_weight, recipe_of, remove_unread
from headfold.plugins.experts.onnx_functions import onnxruntime_body, onnxruntime_can, standard_body
from headfold.plugins.experts.schema import DOMAIN, INPUTS, OP_TYPE, ExpertsAttributes, ExpertsInputs
from headfold.runtime.errors import ConfigError

_ROWS = ("gate_up_weight", "gate_up_bias")


def experts_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the op, in order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]


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


def use_experts_body(model: ir.Model) -> None:
    """Give the op its body: ONNX Runtime's kernel where that has it, otherwise standard ops. Nothing without experts.

    Raises:
        ConfigError: the layers' experts differ in what a body is made for.
    """
    bodies = [_body(node) for node in experts_nodes(model)]
    if any(body != bodies[0] for body in bodies):
        raise ConfigError("the experts of its layers have different activations", fix="headfold wants them alike.")
    for body in bodies[:1]:
        set_body(model, body)


def _body(node: ir.Node) -> onnx.FunctionProto:
    attributes, inputs = attributes_of(node), ExpertsInputs[ir.Value | None].of_node(node.inputs)
    if onnxruntime_can(attributes):
        return onnxruntime_body()
    return standard_body(attributes, inputs.gate_up_bias is not None)


def attributes_of(node: ir.Node) -> ExpertsAttributes:
    """A node's attributes; what it does not say has the op's default."""
    given: dict[str, Any] = {
        field.name: node.attributes[field.name].value
        for field in fields(ExpertsAttributes)
        if field.name in node.attributes
    }
    return ExpertsAttributes(**given)
