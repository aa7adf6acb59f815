"""Weights of four or eight bits in a traced graph: products with them, and rows of an embedding, become ops of ours.

An embedding shares its matrix with the head that is tied to it. Why ops of ours with a kernel's node as body, and not DequantizeLinear
and MatMul, which ONNX Runtime fuses into the same kernel: with these it loads a model of a billion parameters three to five times
slower, and holds 42% more memory.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from headfold.export.graph.bodies import set_level, use_quantized_bodies
from headfold.export.graph.recipes import WeightRecipe, add_weight, recipe_of, remove_unread
from headfold.export.graph.weights import load_model
from headfold.export.model.rounding import stored_names
from headfold.plugins.quantized.schema import BLOCK, DOMAIN, GATHER, MATMUL, Bits, Level, MatMulAttributes

_PLACES = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # of the weight among the inputs


def round_weights(model: ir.Model, bits: Mapping[str, Bits]) -> None:
    """Round these tensors of the checkpoint wherever the graph reads them. The graph is float32, and has no weights yet."""
    done = set[str]()
    for node in list(model.graph):
        place = _PLACES.get(node.op_type) if not node.domain else None
        weight = node.inputs[place] if place is not None else None
        recipe = recipe_of(weight) if weight is not None else None
        widths = {bits.get(name) for name in recipe.sources} if recipe is not None else {None}
        if weight is None or recipe is None or widths == {None}:
            continue
        if len(widths) > 1:
            raise RuntimeError(f"{recipe.name} is joined from tensors of different widths")
        done.update(recipe.sources)
        (width,) = widths
        assert width is not None
        tape = ir.tape.Tape()
        result = _replacement(tape, node, _stored(model, weight, recipe, width), width)
        old = node.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        model.graph.insert_before(node, tape.nodes)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        remove_unread(model, [weight])
    if left := [name for name in bits if name not in done]:
        raise RuntimeError(f"the graph reads {left[0]} in a way that cannot be rounded")
    use_quantized_bodies(model)


def set_level_in_file(path: Path, level: Level) -> None:
    """Have the products of a graph in a file compute at this level; its weights, which lie beside it, are not touched."""
    model = load_model(path)
    set_level(model, level)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _stored(model: ir.Model, weight: ir.Value, recipe: WeightRecipe, bits: Bits) -> tuple[ir.Value, ir.Value]:
    """Values [N, K / BLOCK, BLOCK * bits / 8] and scales [N, K / BLOCK], the same for all that read the weight."""
    assert weight.shape is not None
    first, second = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]  # of a weight: numbers
    rows, columns = (second, first) if recipe.transposed else (first, second)
    shapes = (rows, columns // BLOCK, BLOCK * bits // 8), (rows, columns // BLOCK)
    names = zip(*(stored_names(name, bits) for name in recipe.sources), strict=True)
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT)
    values, scales = (
        model.graph.initializers.get(own.name) or add_weight(model, own, shape, kind)
        for own, shape, kind in zip((WeightRecipe(sources) for sources in names), shapes, kinds, strict=True)
    )
    return values, scales


def _replacement(tape: ir.tape.Tape, node: ir.Node, stored: tuple[ir.Value, ir.Value], bits: Bits) -> ir.Value:
    """Of `Gather(w, ids)`; of `MatMul(x, w.T)`; or of `Gemm(x, w)` whose attributes say the same, with its bias."""
    if node.op_type == "Gather":
        return tape.op(GATHER, [*stored, node.inputs[1]], {"bits": bits}, domain=DOMAIN)
    values, _ = stored
    assert values.shape is not None
    rows, blocks = (int(dim) for dim in values.shape[:2])  # type: ignore[arg-type]
    attributes = vars(MatMulAttributes(K=blocks * BLOCK, N=rows, bits=bits))
    product = tape.op(MATMUL, [node.inputs[0], *stored], attributes, domain=DOMAIN)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return product if bias is None else tape.op("Add", [product, bias])
