"""headfold::MixtureOfExperts as ONNX model-local functions: the bodies that a graph can carry for it.

ONNX Runtime inlines `onnxruntime_body` and runs its own kernel; `standard_body` has only standard ops, for everybody else.
Both obey `headfold.plugins.experts.schema`. A body belongs to one model: activation, layout, and whether there are biases are the same
in all layers.
"""

import onnx
from onnx import AttributeProto, FunctionProto, TensorProto, helper
from onnx.defs import OpSchema

from headfold.plugins.attention.onnx_functions import OPSET
from headfold.plugins.attention.schema import VERSION
from headfold.plugins.dtypes import DTYPES, FLOATS
from headfold.plugins.experts.schema import DOMAIN, INPUTS, OP_TYPE, OUTPUT, ExpertsAttributes

_OPTIONAL = {"gate_up_bias", "down_bias"}
_KINDS = {
    "k": AttributeProto.INT,
    "activation": AttributeProto.STRING,
    "alpha": AttributeProto.FLOAT,
    "beta": AttributeProto.FLOAT,
    "limit": AttributeProto.FLOAT,
    "interleaved": AttributeProto.INT,
}


def schema() -> OpSchema:
    """The operator's ONNX schema; not registered, so that no tool depends on headfold being imported."""
    single, optional = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
    kinds = {
        AttributeProto.INT: OpSchema.AttrType.INT,
        AttributeProto.FLOAT: OpSchema.AttrType.FLOAT,
        AttributeProto.STRING: OpSchema.AttrType.STRING,
    }
    return OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(name, "T", param_option=optional if name in _OPTIONAL else single)
            for name in INPUTS
        ],
        outputs=[OpSchema.FormalParameter(OUTPUT, "T")],
        type_constraints=[("T", [f"tensor({DTYPES[name].onnxruntime})" for name in FLOATS], "all of them")],
        attributes=[OpSchema.Attribute(name, kinds[kind]) for name, kind in _KINDS.items()],
    )


def onnxruntime_can(attributes: ExpertsAttributes) -> bool:
    """Whether ONNX Runtime's kernel computes this: on CPUs it has gated experts with SiLU alone, gate and up alternating."""
    return attributes.activation == "silu" and bool(attributes.interleaved)


def onnxruntime_body() -> FunctionProto:
    """One com.microsoft.MoE node; for attributes that `onnxruntime_can`."""
    node = helper.make_node(
        "MoE",
        ["hidden_states", "router_logits", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias"],
        [OUTPUT],
        domain="com.microsoft",
        activation_type="swiglu",
        swiglu_fusion=1,  # gate and up alternate
        normalize_routing_weights=1,  # the softmax is over the chosen
    )
    for name, ref in {
        "k": "k",
        "activation_alpha": "alpha",
        "activation_beta": "beta",
        "swiglu_limit": "limit",
    }.items():
        node.attribute.append(AttributeProto(name=name, ref_attr_name=ref, type=_KINDS[ref]))
    return _function([node], {"": OPSET, "com.microsoft": 1})


def standard_body(attributes: ExpertsAttributes, biases: bool) -> FunctionProto:
    """A Scan over the experts: each computes for the tokens that chose it, and adds to their sum.

    So no more than one expert's products are in memory, and no expert computes in vain. Of `attributes` the activation and the layout
    count; `biases` tells whether the nodes have them.
    """
    nodes = [
        helper.make_node("Constant", [], ["k_scalar"]),
        helper.make_node("Constant", [], ["vector"], value_ints=[-1]),
        helper.make_node("Reshape", ["k_scalar", "vector"], ["k_vector"]),
        helper.make_node("TopK", ["router_logits", "k_vector"], ["logits", "chosen"], axis=-1),  # [N, k]
        helper.make_node("Softmax", ["logits"], ["shares"], axis=-1),
        helper.make_node("Shape", ["router_logits"], ["routing_shape"]),
        helper.make_node("Shape", ["hidden_states"], ["output_shape"]),
        helper.make_node("ConstantOfShape", ["routing_shape"], ["no_routing_float"]),
        helper.make_node("ConstantOfShape", ["output_shape"], ["nothing"]),  # float32
        helper.make_node("CastLike", ["no_routing_float", "router_logits"], ["no_routing"]),
        helper.make_node("ScatterElements", ["no_routing", "chosen", "shares"], ["routing"], axis=1),  # [N, E]
        helper.make_node("Transpose", ["routing"], ["by_expert"], perm=[1, 0]),  # [E, N]
    ]
    nodes[0].attribute.append(AttributeProto(name="value_int", ref_attr_name="k", type=AttributeProto.INT))
    for name in ("alpha", "beta", "limit"):
        constant = helper.make_node("Constant", [], [f"{name}_float"])
        constant.attribute.append(AttributeProto(name="value_float", ref_attr_name=name, type=AttributeProto.FLOAT))
        nodes += [constant, helper.make_node("CastLike", [f"{name}_float", "hidden_states"], [f"{name}_like"])]
    nodes.append(helper.make_node("Neg", ["limit_like"], ["least"]))
    scanned = ["by_expert", "gate_up_weight", "down_weight", *(["gate_up_bias", "down_bias"] if biases else [])]
    nodes.append(
        helper.make_node(
            "Scan",
            ["nothing", *scanned],
            ["sum"],
            body=_expert(attributes, scanned, biases),
            num_scan_inputs=len(scanned),
        )
    )
    nodes.append(helper.make_node("CastLike", ["sum", "hidden_states"], [OUTPUT]))
    return _function(nodes, {"": OPSET})


def _expert(attributes: ExpertsAttributes, scanned: list[str], biases: bool) -> onnx.GraphProto:
    """One step of the Scan: the sum so far [N, H], float32, and this expert's routing [N], weights and biases."""
    make = helper.make_node
    ints = {"rows_shape": [-1], "even": [0], "odd": [1], "end": [2**62], "columns": [1], "two": [2]}
    nodes = [make("Constant", [], [name], value_ints=values) for name, values in ints.items()]
    nodes += [
        make("NonZero", ["one_by_expert"], ["found"]),  # [1, n]
        make("Reshape", ["found", "rows_shape"], ["rows"]),  # [n]
        make("Gather", ["hidden_states", "rows"], ["x"]),  # [n, H]
        make("Gemm", ["x", "one_gate_up_weight", *(["one_gate_up_bias"] * biases)], ["gate_up"], transB=1),
    ]
    if attributes.interleaved:
        nodes += [
            make("Slice", ["gate_up", "even", "end", "columns", "two"], ["gate"]),  # [n, I]
            make("Slice", ["gate_up", "odd", "end", "columns", "two"], ["up"]),
        ]
    else:
        nodes.append(make("Split", ["gate_up"], ["gate", "up"], axis=1, num_outputs=2))
    nodes += [
        make("Min", ["gate", "limit_like"], ["gate_held"]),
        make("Clip", ["up", "least", "limit_like"], ["up_held"]),
    ]
    match attributes.activation:
        case "silu":
            nodes += [
                make("Mul", ["gate_held", "alpha_like"], ["gate_times_alpha"]),
                make("Sigmoid", ["gate_times_alpha"], ["opened"]),
                make("Mul", ["gate_held", "opened"], ["activated"]),
            ]
        case "gelu":
            nodes.append(make("Gelu", ["gate_held"], ["activated"]))
        case "gelu_tanh":
            nodes.append(make("Gelu", ["gate_held"], ["activated"], approximate="tanh"))
    nodes += [
        make("Add", ["up_held", "beta_like"], ["up_moved"]),
        make("Mul", ["activated", "up_moved"], ["inner"]),
        make("Gemm", ["inner", "one_down_weight", *(["one_down_bias"] * biases)], ["down"], transB=1),  # [n, H]
        make("Gather", ["one_by_expert", "rows"], ["share"]),
        make("Unsqueeze", ["share", "columns"], ["share_column"]),
        make("Mul", ["down", "share_column"], ["shared"]),
        make("Cast", ["shared"], ["shared_float"], to=TensorProto.FLOAT),
        make("Transpose", ["found"], ["places"], perm=[1, 0]),  # [n, 1]
        make("ScatterND", ["sum_so_far", "places", "shared_float"], ["sum_with_it"], reduction="add"),
    ]
    untyped = [onnx.ValueInfoProto(name=name) for name in ("sum_so_far", *(f"one_{name}" for name in scanned))]
    return helper.make_graph(nodes, "expert", untyped, [onnx.ValueInfoProto(name="sum_with_it")])


def _function(nodes: list[onnx.NodeProto], opsets: dict[str, int]) -> FunctionProto:
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_function(DOMAIN, OP_TYPE, list(INPUTS), [OUTPUT], nodes, imports, list(_KINDS))
