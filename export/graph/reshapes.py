"""Heads that are split and moved, and then joined as they were, are left as they were: models do it around every attention."""

import onnx_ir as ir
from onnx_ir.passes import common as common_passes


def drop_idle_reshapes(model: ir.Model) -> None:
    """A `Reshape` that gives what an earlier one was given, with transposes between that undo each other, gives that value itself."""
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        origin = _origin(node)
        output = node.outputs[0]
        if origin is not None and output not in model.graph.outputs:
            ir.convenience.replace_all_uses_with(output, origin)
    common_passes.RemoveUnusedNodesPass()(model)


def _origin(node: ir.Node) -> ir.Value | None:
    """The value that the node makes again, if it does."""
    value, order = node.inputs[0], list[int]()
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Transpose":
        perm = list(producer.attributes["perm"].as_ints())
        order = perm if not order else [perm[axis] for axis in order]
        value = producer.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Reshape" or order != sorted(order):
        return None
    origin, shape = producer.inputs[0], node.outputs[0].shape
    return origin if origin is not None and shape is not None and origin.shape == shape else None
