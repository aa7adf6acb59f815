"""The products that make queries, keys and values of the same input become one: a runtime starts one for each token, not three.

ONNX Runtime's attention then takes it as it is, packed; for other kernels it is taken apart again.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from headfold.export.graph.passes import attention_nodes, columns
from headfold.export.graph.recipes import WeightRecipe, add_weight, recipe_of, remove_unread, shared_constant
from headfold.plugins.attention.schema import ALL_INPUTS, AttentionInputs

_PARTS = ("query", "key", "value")


def join_projections(model: ir.Model) -> None:
    """`MatMul(x, q.T)`, `MatMul(x, k.T)`, `MatMul(x, v.T)`, with or without biases, become `Split(MatMul(x, q+k+v.T))`."""
    for node in attention_nodes(model):
        inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
        found = [_projection(value) for value in (inputs.query, inputs.key, inputs.value)]
        projections = [projection for projection in found if projection is not None]
        if len(projections) < 3 or len({(p.x, p.bias is None) for p in projections}) > 1:
            continue
        _join(model, projections)


def pack_inputs(model: ir.Model) -> None:
    """The attention op takes queries, keys and values packed, if all layers split them off one value and none has norms of heads."""
    nodes = attention_nodes(model)
    splits = [split for node in nodes if (split := _split_of(node)) is not None]
    if len(splits) < len(nodes):
        return
    for node, split in zip(nodes, splits, strict=True):
        packed, *sizes = split.inputs
        assert packed is not None
        packed.type, packed.shape = split.outputs[0].type, _shape(model, sum(map(columns, split.outputs)))
        for name, value in zip(_PARTS, (packed, None, None), strict=True):
            node.replace_input_with(ALL_INPUTS.index(name), value)
        model.graph.remove(split, safe=True)
        remove_unread(model, sizes)


def unpack_inputs(model: ir.Model) -> None:
    """Undo `pack_inputs`."""
    for node in attention_nodes(model):
        inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
        if not inputs.packed or inputs.query is None:
            continue
        size, attributes = columns(inputs.past_key), node.attributes
        sizes = [size * attributes[heads].as_int() for heads in ("num_heads", "kv_num_heads", "kv_num_heads")]
        tape = ir.tape.Tape()
        outputs = _split(model, tape, inputs.query, sizes)
        model.graph.insert_before(node, tape.nodes)
        for name, output, width in zip(_PARTS, outputs, sizes, strict=True):
            output.name, output.type, output.shape = f"{node.name}.{name}", inputs.query.type, _shape(model, width)
            node.replace_input_with(ALL_INPUTS.index(name), output)


def _split_of(node: ir.Node) -> ir.Node | None:
    """What splits one value into a layer's queries, keys and values, which nothing else reads."""
    inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
    values = inputs.query, inputs.key, inputs.value
    split = inputs.query.producer() if inputs.query is not None else None
    if split is None or split.op_type != "Split" or split.domain or split.outputs != values or inputs.norms is not None:
        return None
    alone = all(len(output.uses()) == 1 for output in split.outputs)
    return split if alone and split.attributes.get_int("axis", 0) in (-1, 2) else None


def _split(model: ir.Model, tape: ir.tape.Tape, value: ir.Value, sizes: list[int]) -> Sequence[ir.Value]:
    widths = shared_constant(model, "widths." + ".".join(map(str, sizes)), np.array(sizes))  # the same in most layers
    return tape.op_multi_out("Split", [value, widths], {"axis": -1}, num_outputs=len(sizes))


def _shape(model: ir.Model, width: int) -> ir.Shape:
    """[B, S, width]."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    return ir.Shape([*ids.shape, width])


class _Projection:
    """A product with a weight, and a bias if it has one; `output` is read by the attention alone."""

    def __init__(self, output: ir.Value, product: ir.Node, bias: ir.Value | None) -> None:
        self.output, self.product, self.bias = output, product, bias
        self.x, self.weight = product.inputs
        assert self.weight is not None


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
    outputs = _split(model, tape, product, [columns(part.weight) for part in parts])
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
