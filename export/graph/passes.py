"""Small graph passes of the export, each with one job. They change the model they are given; `fingerprint` tells it from others."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from headfold.export.graph.recipes import (
    WeightRecipe,
    add_weight,
    recipe_of,
    remove_unread,
    set_recipe,
    shared_constant,
)
from headfold.plugins.attention.schema import ALL_INPUTS, DOMAIN, LAST_INDEX, OP_TYPE
from headfold.plugins.names import hidden_state, layer_input, layer_of_output


def name_weights(model: ir.Model, prefix: str, tied: Mapping[str, str]) -> None:
    """Take the tracing wrapper's prefix off the initializers: each is then the tensor of its name in the decoder's state dict.

    `tied` has the first name of each tensor that goes by two.
    """
    for name in list(model.graph.initializers):
        if name.startswith(prefix):
            value = model.graph.initializers.pop(name)
            own = name.removeprefix(prefix)
            set_recipe(value, WeightRecipe((tied.get(own, own),)))
            model.graph.register_initializer(value)


def fold_transposes(model: ir.Model) -> None:
    """A `Transpose` of a weight is done once, when it is saved: `MatMul(x, Transpose(w))` becomes `MatMul(x, "w.T")`.

    Of the last two axes, that is; of experts' weights [E, ., .] too.
    """
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        recipe = recipe_of(weight) if weight is not None else None
        if weight is None or recipe is None or weight.shape is None or len(weight.shape) not in (2, 3):
            continue
        *rest, rows, columns = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]  # of a weight: numbers
        axes = list(range(len(weight.shape)))
        if list(node.attributes.get_ints("perm", axes[::-1])) != [*axes[:-2], axes[-1], axes[-2]]:
            continue
        shape = [*rest, columns, rows]
        recipe = replace(recipe, transposed=not recipe.transposed)
        folded = model.graph.initializers.get(recipe.name) or add_weight(model, recipe, shape, weight.dtype)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded)
        model.graph.remove(node, safe=True)
        remove_unread(model, [weight])


def split_at_once(model: ir.Model) -> None:
    """What torch's `split` and `chunk` are traced as, elements of a sequence, becomes the outputs of a `Split`, as kernels know it."""
    for node in [node for node in model.graph if node.op_type == "SplitToSequence" and not node.domain]:
        x, readers = node.inputs[0], list(node.outputs[0].consumers())
        sizes, *picks = (_constant(reader, 1) for reader in (node, *readers))
        axis = node.attributes.get_int("axis", 0)
        whole = x.shape[axis] if x is not None and x.shape is not None else None
        if (
            x is None
            or sizes is None
            or any(reader.op_type != "SequenceAt" for reader in readers)
            or any(pick is None for pick in picks)
        ):
            continue
        parts = sizes.tolist()
        if isinstance(parts, int):
            if not isinstance(whole, int):
                continue
            parts = [min(parts, whole - begin) for begin in range(0, whole, parts)]
        tape = ir.tape.Tape()
        widths = shared_constant(model, "widths." + ".".join(map(str, parts)), np.array(parts))
        outputs = tape.op_multi_out("Split", [x, widths], {"axis": axis}, num_outputs=len(parts))
        model.graph.insert_before(node, tape.nodes)
        for reader, pick in zip(readers, picks, strict=True):
            assert pick is not None
            old, new = reader.outputs[0], outputs[int(pick)]
            new.type, new.shape, new.name = old.type, old.shape, old.name
            ir.convenience.replace_all_uses_with(old, new)
            model.graph.remove(reader, safe=True)
        model.graph.remove(node, safe=True)


def _constant(node: ir.Node, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    """What a node's input always is, if that is known."""
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the custom op, in order: one per layer."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]


def columns(value: ir.Value | None) -> int:
    """The last size of a table, a cache or a layer's input: a number in every graph."""
    assert value is not None
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]  # not a name


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


def expose_hidden_states(model: ir.Model) -> list[str]:
    """Make the residual stream after each layer a graph output again; returns the outputs' names, first layer first."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    names: list[str] = []
    while (name := hidden_state(len(names))) in values:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
        names.append(name)
    return names


def cut_layers(model: ir.Model) -> int:
    """Each layer reads what the layer before should have handed on from a new input, `layer_input.{i}`; so do the final norm and head.

    What it hands on itself is an output, `hidden_states.{i}`. Returns the number of layers.
    """
    names = expose_hidden_states(model)
    outputs = {value.name: value for value in model.graph.outputs}
    kind = outputs["logits"].type
    for layer, name in enumerate(names):
        handed = outputs[name]
        given = ir.Value(name=layer_input(layer + 1), shape=ir.Shape([None] * 3), type=kind)
        for node, index in handed.uses():
            node.replace_input_with(index, given)
        model.graph.inputs.append(given)
    return len(names)


def split_layers(model: ir.Model) -> list[ir.Model]:
    """A model as one for each layer, cut apart, and a last one of what comes behind them; each has the inputs that it reads.

    Weights stay where they are, and are shared.
    """
    count = cut_layers(model)
    made = []
    for layer in (*range(count), None):
        outputs = [value for value in model.graph.outputs if layer_of_output(value.name or "") == layer]
        graph = ir.convenience.extract(model.graph, model.graph.inputs, outputs)
        inputs = [value for value in graph.inputs if value.uses()]
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        made.append(ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values())))
    return made


def widen_to_float32(model: ir.Model) -> None:
    """Turn a 16-bit graph into a float32 one with the same weights, exactly; the only way where there is no bfloat16 arithmetic."""
    narrow, wide = {ir.DataType.BFLOAT16, ir.DataType.FLOAT16}, ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in narrow:
            value.const_value = _widened(value.const_value)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        values.extend(node.outputs)
        if node.op_type == "Cast" and node.attributes["to"].as_int() in narrow:
            node.attributes["to"] = ir.AttrInt64("to", int(wide))
    for value in values:
        if value.dtype in narrow:
            value.dtype = wide


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def fingerprint(model: ir.Model, tables: Mapping[str, Tensor]) -> bytes:
    """A hash of what a graph computes, of weights only their names; `tables` are the constants that it reads beside them."""
    digest = hashlib.sha256()
    for node in [*model.graph.all_nodes(), *(node for body in model.functions.values() for node in body.all_nodes())]:
        proto = ir.to_proto(node)
        proto.ClearField("metadata_props")  # where it was traced from
        proto.ClearField("doc_string")
        digest.update(proto.SerializeToString(deterministic=True))
    for name, value in model.graph.initializers.items():
        digest.update(name.encode())
        if name in tables:
            digest.update(tables[name].contiguous().view(torch.uint8).numpy().data)
        elif recipe_of(value) is None and value.const_value is not None:
            digest.update(value.const_value.tobytes())
    return digest.digest()
