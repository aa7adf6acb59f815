"""Experts compute and are chosen as the model says: attributes, weights and routing of every node, against a graph traced anew.

A limit that is seldom reached, or a k that lets in experts of no weight, changes no number that the arithmetic would see.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from headfold.export.graph.experts import attributes_of, experts_nodes
from headfold.export.graph.recipes import WeightRecipe, multiplies, recipe_of
from headfold.export.model.rounding import Form
from headfold.export.model.storing import stored_shapes, whole_name
from headfold.export.parity.report import CheckResult, verdict
from headfold.plugins.attention.schema import DOMAIN
from headfold.plugins.experts.schema import INPUTS, QUANTIZED, QUANTIZED_INPUTS, ExpertsInputs
from headfold.plugins.names import is_hidden_state
from headfold.plugins.quantized.schema import Bits

_FIRST = INPUTS.index("gate_up_weight")  # the first of them that is a weight


def prove_experts(model: ir.Model, again: ir.Model) -> CheckResult:
    """Compare a file's graph with one that was traced anew from the model."""
    nodes, expected = experts_nodes(model), experts_nodes(again)
    faults = list[tuple[str, str]]()
    if len(nodes) != len(expected):
        faults.append(("graph", f"has {len(nodes)} mixtures of experts, not {len(expected)}"))
    spelling = _Spelling()
    for number, (node, right) in enumerate(zip(nodes, expected, strict=False)):
        where = f"experts {number}"
        actual = vars(attributes_of(node))
        for name, wanted in vars(attributes_of(right)).items():
            found = actual[name]
            same = np.float32(found) == np.float32(wanted) if isinstance(found, float) else found == wanted
            if not same:
                faults.append((where, f"{name} is {found}, not {wanted}"))
        inputs, others = (ExpertsInputs[ir.Value | None].of_node(x.inputs) for x in (node, right))
        recipes, wanted_recipes = _recipes(node), _recipes(right)
        if node.op_type == QUANTIZED:
            wanted_recipes |= _rounded(right, actual["bits"])
        for name, other in wanted_recipes.items():
            if (found := recipes[name]) != other:
                faults.append((where, f"{name} is {found}, not {other}"))
        if spelling.of(inputs.router_logits) != spelling.of(others.router_logits):
            faults.append((where, "are chosen in another way"))
    return verdict("experts and their routing", faults)


def _recipes(node: ir.Node) -> dict[str, str | None]:
    """The names of a node's weights by their inputs'."""
    names = (QUANTIZED_INPUTS if node.op_type == QUANTIZED else INPUTS)[_FIRST:]
    values = [*node.inputs[_FIRST:], *[None] * len(names)]
    recipes = [recipe_of(value) if value is not None else None for value in values]
    return {name: recipe.name if recipe is not None else None for name, recipe in zip(names, recipes, strict=False)}


def _rounded(node: ir.Node, bits: Bits) -> dict[str, str]:
    """What the matrices of a node would be called in so many bits, and their scales."""
    x, names = ExpertsInputs[ir.Value | None].of_node(node.inputs), dict[str, str]()
    for matrix, value in (("gate_up", x.gate_up_weight), ("down", x.down_weight)):
        recipe = recipe_of(value) if value is not None else None
        if value is None or value.shape is None or recipe is None:
            continue
        parts = stored_shapes(recipe.sources[0], Form(bits), value.shape.numpy())
        for part, source in zip(("weight", "scales"), parts, strict=True):
            names[f"{matrix}_{part}"] = WeightRecipe((source,), alternating=recipe.alternating).name
    return names


class _Spelling:
    """Numbers values by how they are computed, from where a layer begins: equal numbers, in either graph, are equal expressions."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._known: dict[ir.Value, int] = {}

    def of(self, value: ir.Value | None) -> int:
        """Its number."""
        if value is None:
            return -1
        if value not in self._known:
            self._known[value] = self._numbers.setdefault(self._key(value), len(self._numbers))
        return self._known[value]

    def _key(self, value: ir.Value) -> tuple[Any, ...]:
        node = value.producer()
        if node is None:
            if value.is_graph_input() or recipe_of(value) is not None or value.const_value is None:
                return ("given", value.name)
            constant = value.const_value.numpy()
            return ("constant", str(constant.dtype), constant.shape, constant.tobytes())
        of_weight = self._of_weight(node)
        if of_weight is not None:
            return of_weight
        if node.domain == DOMAIN or is_hidden_state(value.name):
            return ("the layer's", value.name if is_hidden_state(value.name) else value.index())
        attributes = tuple(sorted((name, _content(x)) for name, x in node.attributes.items()))
        return (node.domain, node.op_type, value.index(), attributes, tuple(self.of(x) for x in node.inputs))

    def _of_weight(self, node: ir.Node) -> tuple[Any, ...] | None:
        """A product with a weight, or rows of it, however its numbers are stored; a bias is added apart."""
        split = _rows_of_two_widths(node)
        if split is not None:
            return ("rows", split[0], self.of(split[1]))
        match node.domain, node.op_type, list(node.inputs):
            case (_, "QuantizedMatMul" | "RoundedMatMul" | "Float8MatMul", [x, ir.Value() as weight, *_]):
                return ("product", _sources(weight), self.of(x))
            case (_, "QuantizedGather", [ir.Value() as weight, _, ids]):
                return ("rows", _sources(weight), self.of(ids))
            case ("", "Gather", [ir.Value() as weight, ids]) if recipe_of(weight) is not None:
                return ("rows", _sources(weight), self.of(ids))
            case (_, _, [x, ir.Value() as weight, *bias]) if (r := recipe_of(weight)) is not None and multiplies(
                node, r
            ):
                product = ("product", _sources(weight), self.of(x))
                number = self._numbers.setdefault(product, len(self._numbers))
                return ("", "Add", 0, (), (number, self.of(bias[0]))) if bias else product
        return None


def _rows_of_two_widths(node: ir.Node) -> tuple[tuple[str, ...], ir.Value | None] | None:
    """Of `Where(ids < count, rows, rows)` of a weight whose first rows have other bits than the rest: the weight, and the ids."""
    if (node.domain, node.op_type) != ("", "Where"):
        return None
    is_wide, *halves = map(_producer, node.inputs)
    compared = _producer(is_wide.inputs[0]) if is_wide is not None else None
    looked_up = [half.inputs[0] for half in halves if half is not None and half.op_type == "QuantizedGather"]
    weights = {_sources(weight) for weight in looked_up if weight is not None}
    if compared is None or compared.op_type != "Less" or len(looked_up) != 2 or len(weights) != 1:
        return None
    return weights.pop(), compared.inputs[0]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _sources(weight: ir.Value) -> tuple[str, ...]:
    """What a weight is made of, stored in few bits or not."""
    recipe = recipe_of(weight)
    return tuple(whole_name(name) for name in recipe.sources) if recipe is not None else ()


def _content(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor: np.ndarray[Any, Any] = attribute.as_tensor().numpy()
        return f"{tensor.dtype} {tensor.shape} {tensor.tobytes()!r}"
    if attribute.type == ir.AttributeType.FLOAT:
        return str(np.float32(attribute.as_float()))  # as a file holds it
    return str(attribute.value)
