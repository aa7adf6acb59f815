"""Small graph passes of the export, each with one job. They change the model they are given."""

import onnx_ir as ir


def name_initializers(model: ir.Model, prefix: str) -> None:
    """Take the tracing wrapper's prefix off the initializers, so that they are called like the decoder's state dict."""
    for name in list(model.graph.initializers):
        if name.startswith(prefix):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix(prefix)
            model.graph.initializers[value.name] = value


TRANSPOSED = ".T"  # suffix of an initializer that holds its checkpoint tensor transposed


def fold_transposed_weights(model: ir.Model) -> None:
    """`MatMul(x, Transpose(weight))` becomes `MatMul(x, weight.T)`: the weight is transposed once, when it is saved."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.domain:
            continue
        source, output = node.inputs[0], node.outputs[0]
        if source is None or source.name not in model.graph.initializers or source.const_value is None:
            continue
        rows, columns = source.const_value.shape
        transposed = ir.Value(name=f"{source.name}{TRANSPOSED}", shape=ir.Shape([columns, rows]), type=source.type)
        transposed.const_value = ir.LazyTensor(  # no value yet, as in the tensor it replaces
            _no_value, dtype=source.const_value.dtype, shape=ir.Shape([columns, rows]), name=transposed.name
        )
        ir.convenience.replace_all_uses_with(output, transposed)
        model.graph.remove(node, safe=True)
        model.graph.initializers[transposed.name] = transposed  # type: ignore[index]
        if not source.uses():
            del model.graph.initializers[source.name]


def _no_value() -> ir.TensorProtocol:
    raise RuntimeError("the graph has no weights yet: headfold.export.weights attaches them")


def expose_hidden_states(model: ir.Model) -> list[str]:
    """Make the residual stream after each layer a graph output again; returns the outputs' names, first layer first."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = []
    while (name := f"hidden_states.{len(names)}") in values:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
        names.append(name)
    return names
