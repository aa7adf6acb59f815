"""Small graph passes of the export, each with one job. They change the model they are given."""

import numpy as np
import onnx_ir as ir

from headfold.plugins.names import hidden_state
from headfold.plugins.schema import ALL_INPUTS, DOMAIN, LAST_INDEX, OP_TYPE


def name_initializers(model: ir.Model, prefix: str) -> None:
    """Take the tracing wrapper's prefix off the initializers, so that they are called like the decoder's state dict."""
    for name in list(model.graph.initializers):
        if name.startswith(prefix):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix(prefix)
            model.graph.initializers[value.name] = value


JOINED, TRANSPOSED = (
    "+",
    ".T",
)  # in the name of an initializer: several tensors of the checkpoint, end to end; transposed


def fold_weights(model: ir.Model) -> None:
    """What is done to weights alone, `Concat` along the first axis and `Transpose`, is done once, when they are saved.

    `MatMul(x, Transpose(Concat(q, k)))` becomes `MatMul(x, "q+k.T")`.
    """
    initializers = model.graph.initializers
    for node in list(model.graph):
        sources = [value for value in node.inputs if value is not None and value.is_initializer()]
        if node.domain or not sources or len(sources) != len(node.inputs) or None in [v.const_value for v in sources]:
            continue
        first, output, shapes = sources[0].const_value, node.outputs[0], [_shape(value) for value in sources]
        assert first is not None
        shape: tuple[int, ...]
        if node.op_type == "Transpose" and len(shapes[0]) == 2:
            name, shape = f"{sources[0].name}{TRANSPOSED}", shapes[0][::-1]  # [in, out]
        elif node.op_type == "Concat" and node.attributes["axis"].as_int() == 0:
            name = JOINED.join(value.name or "" for value in sources)
            shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        else:
            continue
        folded = ir.Value(name=name, shape=ir.Shape(shape), type=sources[0].type)
        folded.const_value = ir.LazyTensor(_no_value, dtype=first.dtype, shape=ir.Shape(shape), name=name)
        ir.convenience.replace_all_uses_with(output, folded)
        model.graph.remove(node, safe=True)
        initializers[name] = folded
        for value in sources:
            if value.name is not None and not value.uses():
                initializers.pop(value.name, None)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the custom op, in order: one per layer."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]


def share_last_index(model: ir.Model) -> None:
    """Compute the op's `last_index`, past_lengths + S - 1, once, and give it to every layer."""
    nodes = attention_nodes(model)
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    lengths = nodes[0].inputs[ALL_INPUTS.index("past_lengths")]
    tape = ir.tape.Tape()
    one = tape.initializer(ir.tensor(np.array([1]), name=f"{LAST_INDEX}.one"), name=f"{LAST_INDEX}.one")
    ends = tape.op("Add", [lengths, tape.op("Shape", [ids], {"start": 1, "end": 2})])  # [B]
    last = tape.op("Cast", [tape.op("Sub", [ends, one])], {"to": int(ir.DataType.INT32)})
    last.name, last.dtype, last.shape = LAST_INDEX, ir.DataType.INT32, ir.Shape([ids.shape[0]] if ids.shape else [None])
    for initializer in tape.initializers:
        model.graph.register_initializer(initializer)
    model.graph.insert_before(nodes[0], tape.nodes)
    for node in nodes:
        if node.inputs[ALL_INPUTS.index("past_lengths")] is not lengths:
            raise RuntimeError(f"{node.name} has past lengths of its own")
        node.resize_inputs(max(len(node.inputs), ALL_INPUTS.index(LAST_INDEX) + 1))
        node.replace_input_with(ALL_INPUTS.index(LAST_INDEX), last)


def _no_value() -> ir.TensorProtocol:
    raise RuntimeError("the graph has no weights yet: headfold.export.graph.weights attaches them")


def expose_hidden_states(model: ir.Model) -> list[str]:
    """Make the residual stream after each layer a graph output again; returns the outputs' names, first layer first."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    names: list[str] = []
    while (name := hidden_state(len(names))) in values:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
        names.append(name)
    return names


def widen_to_float32(model: ir.Model) -> None:
    """Turn a bfloat16 graph into a float32 one with the same weights, exactly; for backends without bfloat16 arithmetic."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == narrow:
            value.const_value = _widened(value.const_value)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        values.extend(node.outputs)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", int(wide))
    for value in values:
        if value.dtype == narrow:
            value.dtype = wide


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
