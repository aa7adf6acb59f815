"""RoPE that a model spells out before its attention becomes the attention op's own, with tables: one kernel does both.

Nothing is asked of how it is spelled. What lies between a query and the last value that all of it comes from is run on basis vectors:
that gives R, the pairing, and the tables, scaled or not; and on random ones, which proves it. What is no rotation stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes import common as common_passes
from torch import Tensor

from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.recipes import recipe_of, shared_constant
from headfold.plugins.attention.schema import ALL_INPUTS, INPUTS, TABLES, AttentionInputs
from headfold.runtime.session import SILENT

Read = Callable[[str], Tensor]
Array = NDArray[np.float32]
Order = dict[ir.Node, int]  # the place of each node in the graph
_CHUNK = 512  # positions run at a time
_FARTHEST = 64  # nodes between a query and what it is rotated from
_TOLERANCE = 1e-5  # of numbers of order 1, made of one product or two: float32's eps is 1.2e-7


@dataclass(frozen=True)
class _Rotation:
    """`source` [B, H, S, D] or [B, S, H, D] is what `rotated` is rotated from."""

    source: ir.Value
    rotated: ir.Value  # the op's input
    heads: int
    size: int
    heads_first: bool


@dataclass(frozen=True)
class _Tables:
    cos: Array  # [C, R/2]
    sin: Array
    interleaved: bool


def fold_rotations(model: ir.Model, read: Read, capacity: int) -> int:
    """Give the op unrotated queries and keys, and tables of `capacity` positions; returns the number of layers changed.

    `read` gives the model's small tensors, the frequencies among them. A layer whose rotation does not fold, or that has none, gets
    tables that change nothing, for the op rotates in all layers or in none.
    """
    nodes = attention_nodes(model)
    if any(AttentionInputs[ir.Value | None].of_node(node.inputs).tables is not None for node in nodes):
        return 0
    order = {node: index for index, node in enumerate(model.graph)}
    known: dict[tuple[object, ...], _Tables | None] = {}
    folded: dict[int, tuple[_Rotation, _Rotation, _Tables]] = {}
    for layer, node in enumerate(nodes):
        inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
        found = [
            _rotation(order, value, node, part)
            for value, part in ((inputs.query, "num_heads"), (inputs.key, "kv_num_heads"))
        ]
        query, key = found
        if query is None or key is None:
            continue
        tables = [_tables(model, order, rotation, read, capacity, known) for rotation in (query, key)]
        if tables[0] is None or tables[1] is None or not _equal(tables[0], tables[1]):
            continue
        folded[layer] = query, key, tables[0]
    widths = {(tables.cos.shape[1], tables.interleaved) for _, _, tables in folded.values()}
    if len(widths) != 1:  # a body rotates all layers alike
        return 0
    ((half, interleaved),) = widths
    if 2 * half % 16:  # onnxruntime's kernel cannot
        return 0
    values = _Values(model, nodes[0])
    nothing = _Tables(np.ones((capacity, half), np.float32), np.zeros((capacity, half), np.float32), interleaved)
    for layer, node in enumerate(nodes):
        if layer in folded:
            query, key, tables_of = folded[layer]
            node.replace_input_with(ALL_INPUTS.index("query"), _unrotated(model, query, node))
            node.replace_input_with(ALL_INPUTS.index("key"), _unrotated(model, key, node))
        else:
            tables_of = nothing
        node.resize_inputs(max(len(node.inputs), len(INPUTS)))
        for name, value in zip(TABLES, values(tables_of), strict=True):
            node.replace_input_with(ALL_INPUTS.index(name), value)
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(interleaved))
    common_passes.RemoveUnusedNodesPass()(model)
    return len(folded)


class _Values:
    """Initializers of tables: one pair for each that differs."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self._model, self._pairs = model, list[tuple[_Tables, tuple[ir.Value, ir.Value]]]()
        query = node.inputs[0]
        assert query is not None
        assert query.dtype is not None
        self._dtype = query.dtype

    def __call__(self, tables: _Tables) -> tuple[ir.Value, ir.Value]:
        for known, pair in self._pairs:
            if _equal(known, tables):
                return pair
        suffix = f".{len(self._pairs)}" if self._pairs else ""
        cos, sin = (
            shared_constant(self._model, f"{name}{suffix}", table.astype(self._dtype.numpy()))
            for name, table in zip(TABLES, (tables.cos, tables.sin), strict=True)
        )
        self._pairs.append((tables, (cos, sin)))
        return cos, sin


def _equal(a: _Tables, b: _Tables) -> bool:
    return a.interleaved == b.interleaved and np.array_equal(a.cos, b.cos) and np.array_equal(a.sin, b.sin)


def _rotation(order: Order, rotated: ir.Value | None, node: ir.Node, heads: str) -> _Rotation | None:
    """Go back from the op's input to the nearest value of rank 4 that all its data comes from, once positions have come in."""
    if rotated is None or rotated.producer() is None:
        return None
    open_values, positioned = {rotated}, False
    for _ in range(_FARTHEST):
        latest = max(open_values, key=lambda value: order[value.producer()])  # type: ignore[index]
        producer = latest.producer()
        assert producer is not None
        if producer.domain or producer.op_type in {"MatMul", "Gather", "Gemm"}:
            return None
        open_values.remove(latest)
        for value in producer.inputs:
            if value is None or value.producer() is None:
                continue
            if _comes_from(value, "input_ids"):
                open_values.add(value)
            elif value.dtype is not None and value.dtype.is_floating_point():
                positioned |= _comes_from(value, "attention_mask")
        if not open_values:
            return None
        if positioned and len(open_values) == 1:
            (source,) = open_values
            count = node.attributes[heads].as_int()
            shape = list(source.shape) if source.shape is not None else []
            if len(shape) != 4 or not isinstance(shape[3], int) or count not in (shape[1], shape[2]):
                return None
            return _Rotation(source, rotated, count, shape[3], heads_first=shape[1] == count)
    return None


def _comes_from(value: ir.Value, name: str) -> bool:
    """Whether it depends on the content of a graph input; its shape does not count."""
    cached: bool | None = value.meta.get(f"from {name}")
    if cached is None:
        producer = value.producer()
        if producer is None:
            cached = value.name == name
        else:
            cached = producer.op_type != "Shape" and any(_comes_from(x, name) for x in producer.inputs if x is not None)
        value.meta[f"from {name}"] = cached
    return cached


def _tables(
    model: ir.Model,
    order: Order,
    rotation: _Rotation,
    read: Read,
    capacity: int,
    known: dict[tuple[object, ...], _Tables | None],
) -> _Tables | None:
    """The tables of a rotation at every position; None if it is none. What is spelled alike, of the same values, is run once."""
    nodes, outside = _between(rotation)
    key = (_spelling(nodes, rotation), rotation.size, rotation.heads_first)
    if key not in known:
        run = _runner(model, rotation, sorted(nodes, key=order.__getitem__), outside, read)
        known[key] = _measured(run, rotation, capacity)
    return known[key]


def _between(rotation: _Rotation) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that make the rotated value of its source and of positions, and the values without producers they read."""
    seen, outside, stack = dict[ir.Node, None](), set[ir.Value](), [rotation.rotated]
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value is rotation.source:
            continue
        if producer is None:
            outside.add(value)
        elif producer not in seen:
            seen[producer] = None
            stack += [x for x in producer.inputs if x is not None]
    return list(seen), outside


def _spelling(nodes: list[ir.Node], rotation: _Rotation) -> tuple[object, ...]:
    """Equal for rotations that are the same but for their source and heads: operators, and the names of what they share."""
    own = {output for node in nodes for output in node.outputs if _comes_from(output, "input_ids")} | {rotation.source}
    spelled = []
    for node in nodes:
        if any(output in own for output in node.outputs):
            inputs = tuple(
                "own" if value in own else value.name if value is not None else None for value in node.inputs
            )
            spelled.append(
                (
                    node.op_type,
                    "" if node.op_type == "Reshape" else inputs,
                    tuple(sorted(map(str, node.attributes.items()))),
                )
            )
    return tuple(spelled)


def _runner(
    model: ir.Model, rotation: _Rotation, nodes: list[ir.Node], outside: set[ir.Value], read: Read
) -> Callable[[Array, int], Array]:
    """Runs what lies between, `nodes` in order, on heads [n, H, D] at positions from `first` on: the op's input [n, H, D], float32."""
    wide = ir.DataType.FLOAT
    names = {
        value: ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(value.dtype))
        for value in outside
        if value.dtype
    }
    dtype = rotation.source.dtype
    assert dtype is not None
    names[rotation.source] = ir.Value(name="source", shape=ir.Shape([None] * 4), type=ir.TensorType(dtype))
    copies, initializers = [], []
    for value in outside:
        recipe = recipe_of(value)
        if recipe is not None:
            names[value].const_value = ir.tensor(
                recipe.make(read).numpy() if dtype == wide else recipe.make(read), name=value.name
            )
        elif value.const_value is not None:
            names[value].const_value = value.const_value
        if names[value].const_value is not None:
            initializers.append(names[value])
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if x is None else names[x] for x in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            names[old] = new
        copies.append(copy)
    inputs = [names[rotation.source], *(names[x] for x in outside if names[x].const_value is None)]
    graph = ir.Graph(
        inputs,
        [names[rotation.rotated]],
        nodes=copies,
        initializers=initializers,
        opset_imports=dict(model.opset_imports),
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {value.name for value in session.get_inputs()}
    others = {  # only their batch is looked at
        value.name: np.zeros([dim if isinstance(dim, int) else 1 for dim in value.shape], value.dtype.numpy())
        for value in outside
        if value.name in given and value.dtype is not None and value.shape is not None
    }

    def run(heads: Array, first: int) -> Array:
        count = len(heads)
        source = heads.transpose(1, 0, 2)[None] if rotation.heads_first else heads[None]
        feeds = others | {
            "source": np.ascontiguousarray(source.astype(dtype.numpy())),
            "input_ids": np.zeros((1, count), np.int64),
            "attention_mask": np.ones((1, first + count), np.int64),
        }
        (output,) = session.run(None, {name: x for name, x in feeds.items() if name in given})
        result: Array = output.astype(np.float32).reshape(count, rotation.heads, rotation.size)
        return result

    return run


def _measured(run: Callable[[Array, int], Array], rotation: _Rotation, capacity: int) -> _Tables | None:
    """R and the pairing from where a basis vector goes; tables from (1, 0) of every pair; a proof from random heads."""
    heads, size = rotation.heads, rotation.size
    image = run(np.tile(np.eye(size, dtype=np.float32)[0], (2, heads, 1)), 0)[1, 0]  # position 1 of the first dimension
    partners = [int(i) for i in np.flatnonzero(np.abs(image[1:]) > _TOLERANCE) + 1]
    if len(partners) != 1:
        return None
    interleaved = partners[0] == 1 and size > 2
    moved = np.ones(size, np.float32)
    still = np.flatnonzero(np.abs(run(np.tile(moved, (2, heads, 1)), 0)[1, 0] - 1) < 1e-12)
    half = (size - len(still)) // 2 if interleaved else partners[0]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    cos, sin = np.empty((2, capacity, half), np.float32)
    random = np.random.default_rng(0)
    basis = np.zeros(size, np.float32)
    basis[first] = 1
    for begin in range(0, capacity, _CHUNK):
        end = min(begin + _CHUNK, capacity)
        found = run(np.tile(basis, (end - begin, heads, 1)), begin)
        cos[begin:end], sin[begin:end] = found[:, 0, first], found[:, 0, second]
        x = random.standard_normal((end - begin, heads, size)).astype(np.float32)
        expected = x.copy()
        c, s = cos[begin:end, None], sin[begin:end, None]
        expected[..., first] = x[..., first] * c - x[..., second] * s
        expected[..., second] = x[..., second] * c + x[..., first] * s
        if not np.allclose(run(x, begin), expected, atol=_TOLERANCE, rtol=_TOLERANCE):
            return None
    return _Tables(cos, sin, interleaved)


def _unrotated(model: ir.Model, rotation: _Rotation, node: ir.Node) -> ir.Value:
    """The source as the op takes it, [B, S, H*D]."""
    value = rotation.source
    width = rotation.heads * rotation.size
    tape = ir.tape.Tape()
    if rotation.heads_first:
        value = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    flat = tape.op("Reshape", [value, shared_constant(model, f"heads.{width}", np.array([0, 0, width]))])
    flat.type, flat.shape = rotation.rotated.type, rotation.rotated.shape
    model.graph.insert_before(node, tape.nodes)
    return flat
