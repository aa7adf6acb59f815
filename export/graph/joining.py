"""The products that make queries, keys and values of the same input become one: a runtime starts one for each token, not three."""

import numpy as np
import onnx_ir as ir

from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.recipes import WeightRecipe, add_weight, recipe_of, remove_unread, shared_constant
from headfold.plugins.attention.schema import AttentionInputs


def join_projections(model: ir.Model) -> None:
    """`MatMul(x, q.T)`, `MatMul(x, k.T)`, `MatMul(x, v.T)`, with or without biases, become `Split(MatMul(x, q+k+v.T))`."""
    for node in attention_nodes(model):
        inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
        found = [_projection(value) for value in (inputs.query, inputs.key, inputs.value)]
        projections = [projection for projection in found if projection is not None]
        if len(projections) < 3 or len({(p.x, p.bias is None) for p in projections}) > 1:
            continue
        _join(model, projections)


class _Projection:
    """A product with a weight, and a bias if it has one; `output` is read by the attention alone."""

    def __init__(self, output: ir.Value, product: ir.Node, bias: ir.Value | None) -> None:
        self.output, self.product, self.bias = output, product, bias
        self.x, self.weight = product.inputs
        assert self.weight is not None

    @property
    def width(self) -> int:
        assert self.weight is not None
        assert self.weight.shape is not None
        return int(self.weight.shape[1])  # type: ignore[arg-type]  # of a weight: a number


def _projection(value: ir.Value | None) -> _Projection | None:
    node = value.producer() if value is not None else None
    if value is None or node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        is_weight = weight is not None and recipe_of(weight) is not None and len(weight.uses()) == 1
        return _Projection(value, node, None) if is_weight else None
    if node.op_type == "Add":
        for product, bias in (node.inputs, node.inputs[::-1]):
            if bias is not None and bias.is_initializer() and recipe_of(bias) is not None and len(bias.uses()) == 1:
                inner = _projection(product)
                return _Projection(value, inner.product, bias) if inner is not None and inner.bias is None else None
    return None


def _join(model: ir.Model, parts: list[_Projection]) -> None:
    weight = _joined(model, [part.weight for part in parts])
    tape = ir.tape.Tape()
    product = tape.op("MatMul", [parts[0].x, weight])
    if parts[0].bias is not None:
        product = tape.op("Add", [product, _joined(model, [part.bias for part in parts])])
    sizes = [part.width for part in parts]  # the same in most layers
    widths = shared_constant(model, "widths." + ".".join(map(str, sizes)), np.array(sizes))
    outputs = tape.op_multi_out("Split", [product, widths], {"axis": -1}, num_outputs=len(parts))
    model.graph.insert_before(parts[0].product, tape.nodes)
    for part, output in zip(parts, outputs, strict=True):
        output.type, output.shape, output.name = part.output.type, part.output.shape, part.output.name
        last = part.output.producer()
        assert last is not None
        ir.convenience.replace_all_uses_with(part.output, output)
        model.graph.remove([last, part.product] if last is not part.product else [last], safe=True)
    remove_unread(model, [value for part in parts for value in (part.weight, part.bias)])


def _joined(model: ir.Model, values: list[ir.Value | None]) -> ir.Value:
    """A new weight of several, end to end; it has no value yet, as they have none."""
    recipes = [recipe for value in values if value is not None and (recipe := recipe_of(value)) is not None]
    first = values[0]
    assert first is not None
    assert first.shape is not None
    sizes = [int(value.shape[-1]) for value in values if value is not None and value.shape is not None]  # type: ignore[arg-type]
    rows = [int(dim) for dim in first.shape[:-1]]  # type: ignore[arg-type]
    return add_weight(model, WeightRecipe.joined(*recipes), [*rows, sum(sizes)], first.dtype)
