"""Weights of few bits in a traced graph: products with them, rows of an embedding, and experts, become ops of ours.

An embedding shares its matrix with the head that is tied to it. Why ops of ours with a kernel's node as body, and not DequantizeLinear
and MatMul, which ONNX Runtime fuses into the same kernel: with these it loads a model of a billion parameters three to five times
slower, and holds 42% more memory.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.graph.bodies import (
    block_sums,
    in_blocks,
    quantized_products,
    set_level,
    use_experts_bodies,
    use_quantized_bodies,
)
from headfold.export.graph.experts import attributes_of, experts_nodes
from headfold.export.graph.recipes import (
    WeightRecipe,
    add_weight,
    multiplies,
    recipe_of,
    remove_unread,
    replace_node,
    shared_constant,
)
from headfold.export.graph.weights import load_model
from headfold.export.model.rounding import Form
from headfold.export.model.storing import OFFSETS, ORDER, SCALES, stored_bits, stored_shapes
from headfold.plugins.experts.onnx_functions import onnxruntime_can
from headfold.plugins.experts.schema import QUANTIZED as EXPERTS
from headfold.plugins.experts.schema import ExpertsInputs
from headfold.plugins.quantized.schema import (
    BLOCK,
    DOMAIN,
    FLOAT8,
    GATHER,
    MATMUL,
    ROUNDED,
    Bits,
    Level,
    MatMulAttributes,
)

# Sums of blocks of a product's input, and its columns in another order, which other products take too
Made = dict[tuple[ir.Value, int | ir.Value], ir.Value]
_NUMBERS = {7: ir.DataType.INT8, "float8": ir.DataType.FLOAT8E4M3FN}  # how they are stored; others are packed
_PLACES = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # of the weight among the inputs


def roundable(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The weights [N, K] that the graph reads as products, or looks up rows in, and in no other way: each with those joined with it.

    Experts' matrices, [E, N, K], are joined with their layer's others. None that experts are chosen by: few numbers, and who is chosen
    should not hang on their rounding.
    """
    routing, found, refused = _routing(model), dict[str, tuple[str, ...]](), set[str]()
    experts = {x: weights for node in experts_nodes(model) for weights in [_experts_weights(node)] for x in weights}
    for value in model.graph.initializers.values():
        recipe = recipe_of(value)
        if recipe is None:
            continue
        if value in experts:
            found[recipe.sources[0]] = tuple(other.sources[0] for other in experts[value].values())
            continue
        if value in routing or not all(_can_be_rounded(node, place, recipe) for node, place in value.uses()):
            refused.update(recipe.sources)
        for name in recipe.sources:  # of a tied one: the product, whatever it is joined with
            found[name] = max(found.get(name, ()), recipe.sources, key=len)
    groups = {name: sources for name, sources in found.items() if refused.isdisjoint(sources)}
    return {name: sources for name, sources in groups.items() if name not in refused}


def transposed(model: ir.Model) -> frozenset[str]:
    """Those of them that the checkpoint has transposed: some experts' matrices, [E, K, N]."""
    recipes = [recipe for node in experts_nodes(model) for recipe in _experts_weights(node).values()]
    return frozenset(recipe.sources[0] for recipe in recipes if recipe.transposed)


def _experts_weights(node: ir.Node) -> dict[ir.Value, WeightRecipe]:
    """The matrices of a layer's experts that can have few bits: where ONNX Runtime has a kernel, of whole blocks, and nobody else's."""
    x, found = ExpertsInputs[ir.Value | None].of_node(node.inputs), dict[ir.Value, WeightRecipe]()
    if not onnxruntime_can(attributes_of(node)):
        return {}
    for weight in (x.gate_up_weight, x.down_weight):
        recipe = recipe_of(weight) if weight is not None else None
        if (
            weight is None
            or weight.shape is None
            or recipe is None
            or len(recipe.sources) > 1
            or len(weight.uses()) > 1
        ):
            return {}
        if any(not isinstance(size, int) or size % BLOCK for size in weight.shape[1:]):
            return {}
        found[weight] = recipe
    return found


def _can_be_rounded(node: ir.Node, place: int, recipe: WeightRecipe) -> bool:
    x, weight = node.inputs[0], node.inputs[place]
    if (
        node.domain
        or _PLACES.get(node.op_type) != place
        or recipe.alternating
        or weight is None
        or weight.shape is None
    ):
        return False
    if len(weight.shape) != 2 or x is None or x.shape is None:
        return False
    if node.op_type == "Gather":
        looked_up = node.inputs[1]
        ids = looked_up.shape if looked_up is not None else None
        return not recipe.transposed and node.attributes.get_int("axis", 0) == 0 and ids is not None and len(ids) == 2
    return multiplies(node, recipe)


def _routing(model: ir.Model) -> set[ir.Value]:
    """The weights of the products that make the scores of experts."""
    found, seen = set[ir.Value](), set[ir.Value]()
    left = [ExpertsInputs[ir.Value | None].of_node(node.inputs).router_logits for node in experts_nodes(model)]
    while left:
        value = left.pop()
        node = value.producer() if value is not None and value not in seen else None
        if value is None or node is None:
            continue
        seen.add(value)
        weights = [x for x in node.inputs if x is not None and recipe_of(x) is not None]
        if node.op_type in _PLACES and weights:
            found.update(weights)
        else:
            left.extend(node.inputs)
    return found


def round_weights(model: ir.Model, checkpoint: RoundedTensors) -> None:
    """Store what is rounded in few bits wherever the graph reads it. The graph has no weights yet.

    Where tensors that are joined into one product have different forms, there are as many products, and their results are joined.
    """
    forms, done, made = checkpoint.forms, set[str](), Made()
    for node in experts_nodes(model):
        weights = _experts_weights(node)
        names = {recipe.sources[0] for recipe in weights.values()}
        if not names.isdisjoint(forms):
            if len({forms[name].bits if name in forms else None for name in names}) > 1:
                raise RuntimeError(f"{', '.join(sorted(names))} have different forms, and one op")
            done.update(names)
            tape = ir.tape.Tape()
            replace_node(model, node, tape, _experts(model, tape, node, weights, checkpoint))
            remove_unread(model, weights)
    for node in list(model.graph):
        place = _PLACES.get(node.op_type) if not node.domain else None
        weight = node.inputs[place] if place is not None else None
        recipe = recipe_of(weight) if weight is not None else None
        if recipe is None or forms.keys().isdisjoint(recipe.sources):
            continue
        if left := [name for name in recipe.sources if name not in forms]:
            raise RuntimeError(f"{recipe.name} is joined from tensors of which {left[0]} is not rounded")
        done.update(recipe.sources)
        tape = ir.tape.Tape()
        if node.op_type == "Gather":
            result = _rows(model, tape, node, recipe.sources[0], checkpoint)
        else:
            result = _products(model, tape, node, recipe.sources, checkpoint, made)
        replace_node(model, node, tape, result)
        remove_unread(model, [weight])
    if left := [name for name in forms if name not in done]:
        raise RuntimeError(f"the graph reads {left[0]} in a way that cannot be rounded")
    _drop_flattening(model)
    use_quantized_bodies(model)
    use_experts_bodies(model)


def _drop_flattening(model: ir.Model) -> None:
    """`Reshape(product(Reshape(x)))` becomes `product(x)`: a Gemm wants rows of a matrix, products of ours take x [..., K]."""
    for node in quantized_products(model):
        flat, product = node.inputs[0], node.outputs[0]
        before = flat.producer() if flat is not None else None
        after = next((reader for reader, _ in product.uses()), None)
        if before is None or after is None or before.op_type != "Reshape" or after.op_type != "Reshape":
            continue
        x, result = before.inputs[0], after.outputs[0]
        if x is None or x.shape is None or result.shape is None or len(product.uses()) > 1:
            continue
        columns, rows = (node.attributes[name].as_int() for name in ("K", "N"))  # of the matrix
        if x.shape[-1] != columns or [*x.shape[:-1], rows] != list(result.shape):
            continue
        node.replace_input_with(0, x)
        product.name, product.type, product.shape, result.name = result.name, result.type, result.shape, product.name
        ir.convenience.replace_all_uses_with(result, product, replace_graph_outputs=True)
    common_passes.RemoveUnusedNodesPass()(model)


def set_level_in_file(
    path: Path, level: Level, bits: Collection[Bits] = (4, 8), names: Collection[str] | None = None
) -> bool:
    """`set_level` of a graph in a file; its weights, which lie beside it, are not touched."""
    model = load_model(path)
    there = set_level(model, level, bits, names)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return there


def _experts(
    model: ir.Model,
    tape: ir.tape.Tape,
    node: ir.Node,
    weights: Mapping[ir.Value, WeightRecipe],
    checkpoint: RoundedTensors,
) -> ir.Value:
    """In place of a mixture of experts with these weights."""
    x = ExpertsInputs[ir.Value | None].of_node(node.inputs)
    assert x.hidden_states is not None
    numbers, scales = list[ir.Value](), list[ir.Value]()
    for recipe in weights.values():
        name = recipe.sources[0]
        form = checkpoint.forms[name]
        parts = stored_shapes(name, form, checkpoint.shapes()[name])
        kinds = (ir.DataType.UINT8, x.hidden_states.dtype)
        for values, (part, shape), kind in zip((numbers, scales), parts.items(), kinds, strict=True):
            stored = WeightRecipe((part,), alternating=recipe.alternating)
            values.append(add_weight(model, stored, shape, kind))
    inputs = [x.hidden_states, x.router_logits, *numbers, x.gate_up_bias, x.down_bias, *scales]
    attributes = {**vars(attributes_of(node)), "bits": form.bits}
    return tape.op(EXPERTS, inputs, attributes, domain=DOMAIN)


def _rows(model: ir.Model, tape: ir.tape.Tape, node: ir.Node, name: str, checkpoint: RoundedTensors) -> ir.Value:
    """In place of `Gather(w, ids)`."""
    form, ids = checkpoint.forms[name], node.inputs[1]
    if form.wide_rows:
        return _rows_of_two_widths(model, tape, node, name, checkpoint)
    values, scales, *others = _stored(model, tape, form, {name: checkpoint.shapes()[name]}, node.outputs[0].dtype)
    rows = tape.op(GATHER, [values, scales, ids], {"bits": form.bits}, domain=DOMAIN)  # [B, S, K]
    if not others:
        return rows
    rows.type, rows.shape = node.outputs[0].type, node.outputs[0].shape
    whole = shared_constant(model, "blocks.whole", np.array([0, 0, -1]))
    last = shared_constant(model, "blocks.last", np.array([-1]))
    offsets = tape.op("Unsqueeze", [tape.op("Gather", [others[0], ids], {"axis": 0}), last])  # [B, S, G, 1]
    return tape.op("Reshape", [tape.op("Add", [in_blocks(model, tape, rows, form.block), offsets]), whole])


def _rows_of_two_widths(
    model: ir.Model, tape: ir.tape.Tape, node: ir.Node, name: str, checkpoint: RoundedTensors
) -> ir.Value:
    """Both are looked up, of an id that is the other's the one next to it, and each token takes its own."""
    form, ids, floats = checkpoint.forms[name], node.inputs[1], node.outputs[0].dtype
    count, last, none, axis = (
        shared_constant(model, f"rows.{part}.{form.wide_rows}", np.array(number))
        for part, number in {"wide": form.wide_rows, "last": form.wide_rows - 1, "first": 0, "axis": [-1]}.items()
    )
    own = tape.op("Min", [ids, last]), tape.op("Max", [tape.op("Sub", [ids, count]), none])
    wide, others = (
        tape.op(GATHER, [*_stored(model, tape, piece, {name: shape}, floats), at], {"bits": piece.bits}, domain=DOMAIN)
        for (piece, shape), at in zip(form.pieces(checkpoint.shapes()[name]), own, strict=True)
    )  # [B, S, K]
    is_wide = tape.op("Unsqueeze", [tape.op("Less", [ids, count]), axis])
    return tape.op("Where", [is_wide, wide, others])


def _products(
    model: ir.Model,
    tape: ir.tape.Tape,
    node: ir.Node,
    sources: Sequence[str],
    checkpoint: RoundedTensors,
    made: Made,
) -> ir.Value:
    """In place of `MatMul(x, w.T)`; or of `Gemm(x, w)` whose attributes say the same, with its bias.

    `made` has what products with offsets or another order take of the same x.
    """
    given, products = node.inputs[0], list[ir.Value]()
    assert given is not None
    assert given.shape is not None
    for form, shapes in _matrices(sources, checkpoint):
        stored = _stored(model, tape, form, shapes, given.dtype, transposed=True)
        if form.bits == 7 or form.bits == "float8":
            products.append(tape.op(ROUNDED if form.bits == 7 else FLOAT8, [given, *stored], domain=DOMAIN))
            continue
        order = stored.pop() if form.order is not None else None
        offsets = stored.pop() if form.offsets else None
        x = given
        if order is not None:
            if (given, order) not in made:
                made[given, order] = tape.op("Gather", [given, order], {"axis": len(given.shape) - 1})
                made[given, order].type, made[given, order].shape = given.type, given.shape
            x = made[given, order]
        rows, columns = sum(rows for rows, _ in shapes.values()), next(iter(shapes.values()))[1]
        attributes = MatMulAttributes(K=columns, N=rows, bits=stored_bits(form.bits), block_size=form.block)
        product = tape.op(MATMUL, [x, *stored], vars(attributes), domain=DOMAIN)
        if offsets is not None:
            if (x, form.block) not in made:
                made[x, form.block] = block_sums(model, tape, x, form.block)
            product = tape.op("Add", [product, tape.op("MatMul", [made[x, form.block], offsets])])
        products.append(product)
    result = products[0] if len(products) == 1 else tape.op("Concat", products, {"axis": -1})
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return result if bias is None else tape.op("Add", [result, bias])


def _matrices(
    sources: Sequence[str], checkpoint: RoundedTensors
) -> Iterator[tuple[Form, Mapping[str, tuple[int, ...]]]]:
    """Of some weights, end to end, those that are one matrix: their form, and the shape of what is in it of each."""
    for form, group in groupby(sources, key=checkpoint.forms.__getitem__):
        shapes = {name: checkpoint.shapes()[name] for name in group}
        if form.wide_rows:
            yield from ((piece, {name: part}) for name, shape in shapes.items() for piece, part in form.pieces(shape))
        else:
            yield form, shapes


def _stored(
    model: ir.Model,
    tape: ir.tape.Tape,
    form: Form,
    weights: Mapping[str, tuple[int, ...]],
    floats: ir.DataType | None,
    transposed: bool = False,
) -> list[ir.Value]:
    """The parts of weights of one form, end to end, the same for all that read them: see `stored_shapes`.

    Scales and offsets are `floats`, but for narrow scales, which are stored in float16 and cast. Offsets are `transposed` for a
    product, [G, N]; so are numbers of seven bits, [K, N].
    """
    shapes = dict[str, tuple[int, ...]]()
    each = []  # the parts of each
    for name, shape in weights.items():
        parts = stored_shapes(name, form, shape)
        shapes |= parts
        each.append(list(parts))
    values = []
    for sources in zip(*each, strict=True):
        order = sources[0].startswith(ORDER)  # which they share
        real = sources[0].endswith((SCALES, OFFSETS))
        turned = transposed and (sources[0].endswith(OFFSETS) or (form.bits == 7 and not real))
        recipe = WeightRecipe(sources[:1] if order else sources, turned)
        cast = sources[0].endswith(SCALES) and form.narrow
        kind = floats if real else _NUMBERS.get(form.bits, ir.DataType.UINT8)
        kind = ir.DataType.FLOAT16 if cast else ir.DataType.INT64 if order else kind
        known = model.graph.initializers.get(recipe.name)
        value = known or add_weight(model, recipe, recipe.shape(shapes), kind)
        values.append(_cast(tape, value, floats) if cast else value)
    return values


def _cast(tape: ir.tape.Tape, value: ir.Value, kind: ir.DataType | None) -> ir.Value:
    """An initializer in another dtype, once: ONNX Runtime does it while it loads."""
    known = next((node.outputs[0] for node, _ in value.uses() if node.op_type == "Cast"), None)
    if known is not None:
        return known
    assert kind is not None
    result = tape.op("Cast", [value], {"to": int(kind)})
    result.type, result.shape = ir.TensorType(kind), value.shape
    return result
