"""Exchange what implements the attention op: what makes one master serve every backend."""

from typing import cast

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from headfold.export.graph.passes import attention_nodes
from headfold.plugins.dtypes import DTYPES, QUANTIZED
from headfold.plugins.onnx_functions import standard_body
from headfold.plugins.schema import ALL_INPUTS, DOMAIN, LAST_INDEX, VERSION, AttentionInputs


def set_attention_body(model: ir.Model, function: onnx.FunctionProto) -> None:
    """Give the attention op this body in place of the one the graph has."""
    body = cast(ir.Function, ir.from_proto(function))
    model.functions[body.identifier()] = body
    model.opset_imports[DOMAIN] = VERSION
    for domain, version in body.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    for domain in set(model.opset_imports) - {"", DOMAIN, *body.opset_imports}:
        del model.opset_imports[domain]  # of the body that went


def use_standard_body(model: ir.Model, zeroed: bool = False) -> None:
    """Give the attention op the body of standard ops; `zeroed` as there."""
    inputs = AttentionInputs.of_node(attention_nodes(model)[0].inputs)
    cos, cache = inputs.cos_cache, inputs.past_key
    assert cos.shape is not None
    assert cache is not None
    stored = {DTYPES[name].onnx: name for name in QUANTIZED}.get(int(cache.dtype or 0))
    rotary_dim = 2 * int(cos.shape[1])  # type: ignore[arg-type]  # a number here
    set_attention_body(model, standard_body(rotary_dim, inputs.norms is not None, stored, zeroed))


def inline_standard_body(model: ir.Model) -> None:
    """Replace the attention op by standard ops, which TensorRT imports as its own layers; the runtime zeroes its caches."""
    use_standard_body(model, zeroed=True)
    common_passes.InlinePass()(model)
    for node in model.graph:
        if (
            node.op_type == "Attention"
            and "softcap" in node.attributes
            and node.attributes["softcap"].as_float() == 0.0
        ):
            node.attributes.pop("softcap")  # off; what is left is a real one, and TensorRT has none


def widen_float8_caches(model: ir.Model) -> None:
    """Keep the numbers of float8 caches in float32 and compute with standard ops, exactly: for backends without float8."""
    use_standard_body(model)
    values = [value for node in attention_nodes(model) for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.outputs, *values):
        if value.dtype == ir.DataType.FLOAT8E4M3FN:
            value.dtype = ir.DataType.FLOAT


def call_plugin(model: ir.Model) -> None:
    """Leave the attention op in place, but as a call of the plugin of its name.

    `total_sequence_length` is a number on the host, which a plugin cannot have; but it can see its inputs' shapes. So that input
    becomes `attention_mask` [B, T], of which only T counts. `last_index` is ONNX Runtime's alone.
    """
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    for node in attention_nodes(model):
        given = AttentionInputs.of_node(node.inputs).given() | {"total_sequence_length": mask}
        inputs = [given[name] for name in ALL_INPUTS if name in given and name != LAST_INDEX]
        node.resize_inputs(len(inputs))
        for position, value in enumerate(inputs):
            node.replace_input_with(position, value)
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(VERSION))
    model.functions.clear()
    for domain in set(model.opset_imports) - {"", DOMAIN}:
        del model.opset_imports[domain]
