"""The ONNX function bodies of headfold::GroupedQueryAttention.

There is one, for ONNX Runtime, which inlines it and runs its own kernel.
"""

import onnx
from headfold.plugins.schema import DOMAIN, INPUTS, OP_TYPE, OUTPUTS
from onnx import helper

OPSET = 24
_ATTRIBUTES = {
    "num_heads": onnx.AttributeProto.INT,
    "kv_num_heads": onnx.AttributeProto.INT,
    "scale": onnx.AttributeProto.FLOAT,
    "local_window_size": onnx.AttributeProto.INT,
    "softcap": onnx.AttributeProto.FLOAT,
    "rotary_interleaved": onnx.AttributeProto.INT,
}


def onnxruntime_body() -> onnx.FunctionProto:
    """One com.microsoft.GroupQueryAttention node, which takes the last valid index of each sequence, not a length."""
    attention = helper.make_node(
        "GroupQueryAttention",
        ["seqlens_k" if name == "past_lengths" else name for name in INPUTS],
        list(OUTPUTS),
        domain="com.microsoft",
        do_rotary=1,
    )
    for name, kind in _ATTRIBUTES.items():
        attribute = onnx.AttributeProto(name=name, ref_attr_name=name, type=kind)
        attention.attribute.append(attribute)
    nodes = [
        helper.make_node("Shape", ["query"], ["new_tokens"], start=1, end=2),  # [1]: S
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Add", ["past_lengths", "new_tokens"], ["lengths"]),  # [B]
        helper.make_node("Sub", ["lengths", "one"], ["last_index"]),
        helper.make_node("Cast", ["last_index"], ["seqlens_k"], to=onnx.TensorProto.INT32),
        attention,
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_function(DOMAIN, OP_TYPE, list(INPUTS), list(OUTPUTS), nodes, opsets, list(_ATTRIBUTES))
