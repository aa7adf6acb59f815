"""headfold::MixtureOfExperts, and the quantized one, as ONNX model-local functions: the bodies that a graph can carry for them.

ONNX Runtime inlines `onnxruntime_body` and runs its own kernel; `standard_body` has only standard ops, for everybody else.
Both obey `headfold.plugins.experts.schema`. A body belongs to one model: activation, layout, and whether there are biases are the same
in all layers.
"""

import onnx
from onnx import FunctionProto, TensorProto, helper
from onnx.defs import OpSchema

from headfold.plugins.attention.schema import VERSION
from headfold.plugins.dtypes import DTYPES, FLOATS
from headfold.plugins.experts.schema import (
    DOMAIN,
    INPUTS,
    OP_TYPE,
    OUTPUT,
    QUANTIZED,
    QUANTIZED_INPUTS,
    ExpertsAttributes,
    ExpertsInputs,
    QuantizedExpertsAttributes,
    QuantizedExpertsInputs,
)
from headfold.plugins.onnx_body import OPSET, Body, Operator
from headfold.plugins.quantized.onnx_functions import shifts, unpack
from headfold.plugins.quantized.schema import BLOCK

_OPERATOR = Operator(DOMAIN, OP_TYPE, VERSION, ExpertsInputs, ExpertsAttributes, (OUTPUT,))
_QUANTIZED = Operator(DOMAIN, QUANTIZED, VERSION, QuantizedExpertsInputs, QuantizedExpertsAttributes, (OUTPUT,))
# What our attributes are called in ONNX Runtime's kernels
_REFS = {"k": "k", "activation_alpha": "alpha", "activation_beta": "beta", "swiglu_limit": "limit"}


def schema() -> OpSchema:
    """The operator's ONNX schema."""
    return _OPERATOR.schema({}, [("T", [f"tensor({DTYPES[name].onnxruntime})" for name in FLOATS], "all of them")])


def onnxruntime_can(attributes: ExpertsAttributes) -> bool:
    """Whether ONNX Runtime's kernel computes this: on CPUs it has gated experts with SiLU alone, gate and up alternating."""
    return attributes.activation == "silu" and bool(attributes.interleaved)


def onnxruntime_body() -> FunctionProto:
    """One com.microsoft.MoE node; for attributes that `onnxruntime_can`."""
    body = Body(_OPERATOR)
    body(
        "MoE",
        ["hidden_states", "router_logits", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias"],
        OUTPUT,
        refs=_REFS,
        domain="com.microsoft",
        activation_type="swiglu",
        swiglu_fusion=1,  # gate and up alternate
        normalize_routing_weights=1,  # the softmax is over the chosen
    )
    return body.function({"": OPSET, "com.microsoft": 1}, INPUTS)


def onnxruntime_quantized_body(exact: bool = False) -> FunctionProto:
    """One com.microsoft.QMoE node; for attributes that `onnxruntime_can`.

    With matrices of eight bits it rounds its inputs at every level, if it can pack them while it loads: `exact` has it make wide those
    of the chosen experts instead, each time, for its scales are known only when it runs.
    """
    body = Body(_QUANTIZED)
    weights = [f"{name}_{part}" for name in ("gate_up", "down") for part in ("weight", "scales", "bias")]
    if exact:
        body("Shape", ["hidden_states"], "tokens", start=0, end=1)
        for name, value in {"first": 0, "many": 2**31}.items():
            body.ints(name, value)
        body("Add", ["tokens", "many"], "all")  # experts, and more
        for place in (1, 4):
            weights[place] = body("Slice", [weights[place], "first", "all"], f"same_{weights[place]}")
    body(
        "QMoE",
        ["hidden_states", "router_logits", *weights],
        OUTPUT,
        refs=_REFS | {"expert_weight_bits": "bits", "accuracy_level": "accuracy_level"},
        domain="com.microsoft",
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        block_size=BLOCK,
        weights_prepacked=0,  # on GPUs they would be, by default
    )
    return body.function({"": OPSET, "com.microsoft": 1}, QUANTIZED_INPUTS)


def standard_body(attributes: ExpertsAttributes, biases: bool) -> FunctionProto:
    """A Scan over the experts: each computes for the tokens that chose it, and adds to their sum.

    So no more than one expert's products are in memory, and no expert computes in vain. Of `attributes` the activation and the layout
    count, and whether they are those of the quantized operator, whose matrices are made wide one expert at a time, and whose inputs
    are never rounded; `biases` tells whether the nodes have them.
    """
    quantized = isinstance(attributes, QuantizedExpertsAttributes)
    body = Body(_QUANTIZED if quantized else _OPERATOR)
    body("Constant", [], "k_scalar", refs={"value_int": "k"})
    body.ints("vector", -1)
    body("Reshape", ["k_scalar", "vector"], "k_vector")
    body("TopK", ["router_logits", "k_vector"], ["logits", "chosen"], axis=-1)  # [N, k]
    body("Softmax", ["logits"], "shares", axis=-1)
    body("Shape", ["router_logits"], "routing_shape")
    body("Shape", ["hidden_states"], "output_shape")
    body("ConstantOfShape", ["routing_shape"], "no_routing_float")
    body("ConstantOfShape", ["output_shape"], "nothing")  # float32
    body("CastLike", ["no_routing_float", "router_logits"], "no_routing")
    body("ScatterElements", ["no_routing", "chosen", "shares"], "routing", axis=1)  # [N, E]
    body("Transpose", ["routing"], "by_expert", perm=[1, 0])  # [E, N]
    for name in ("alpha", "beta", "limit"):
        body("Constant", [], f"{name}_float", refs={"value_float": name})
        body("CastLike", [f"{name}_float", "hidden_states"], f"{name}_like")
    body("Neg", ["limit_like"], "least")
    scanned = ["by_expert", "gate_up_weight", "down_weight", *(["gate_up_bias", "down_bias"] if biases else [])]
    if quantized:
        scanned += ["gate_up_scales", "down_scales"]
        shifts(body)
        body("CastLike", ["half", "hidden_states"], "wide_half")
        body.ints("in_blocks", 0, -1, BLOCK)
        body.ints("end_to_end", 0, -1)
    expert = _expert(attributes, scanned, biases)
    body("Scan", ["nothing", *scanned], "sum", body=expert, num_scan_inputs=len(scanned))
    body("CastLike", ["sum", "hidden_states"], OUTPUT)
    return body.function({"": OPSET}, QUANTIZED_INPUTS if quantized else INPUTS)


def _expert(attributes: ExpertsAttributes, scanned: list[str], biases: bool) -> onnx.GraphProto:
    """One step of the Scan: the sum so far [N, H], float32, and this expert's routing [N], weights and biases."""
    body = Body(_OPERATOR)
    matrices = [f"one_{name}_weight" for name in ("gate_up", "down")]
    if isinstance(attributes, QuantizedExpertsAttributes):
        matrices = [_widened(body, name) for name in ("gate_up", "down")]
    for name, value in {"rows_shape": -1, "even": 0, "odd": 1, "end": 2**62, "columns": 1, "step": 2}.items():
        body.ints(name, value)
    body("NonZero", ["one_by_expert"], "found")  # [1, n]
    body("Reshape", ["found", "rows_shape"], "rows")  # [n]
    body("Gather", ["hidden_states", "rows"], "x")  # [n, H]
    body("Gemm", ["x", matrices[0], *(["one_gate_up_bias"] * biases)], "gate_up", transB=1)
    if attributes.interleaved:
        body("Slice", ["gate_up", "even", "end", "columns", "step"], "gate")  # [n, I]
        body("Slice", ["gate_up", "odd", "end", "columns", "step"], "up")
    else:
        body("Split", ["gate_up"], ["gate", "up"], axis=1, num_outputs=2)
    body("Min", ["gate", "limit_like"], "gate_held")
    body("Clip", ["up", "least", "limit_like"], "up_held")
    match attributes.activation:
        case "silu":
            body("Mul", ["gate_held", "alpha_like"], "gate_times_alpha")
            body("Sigmoid", ["gate_times_alpha"], "opened")
            body("Mul", ["gate_held", "opened"], "activated")
        case "gelu":
            body("Gelu", ["gate_held"], "activated")
        case "gelu_tanh":
            body("Gelu", ["gate_held"], "activated", approximate="tanh")
    body("Add", ["up_held", "beta_like"], "up_moved")
    body("Mul", ["activated", "up_moved"], "inner")
    body("Gemm", ["inner", matrices[1], *(["one_down_bias"] * biases)], "down", transB=1)  # [n, H]
    body("Gather", ["one_by_expert", "rows"], "share")
    body("Unsqueeze", ["share", "columns"], "share_column")
    body("Mul", ["down", "share_column"], "shared")
    body("Cast", ["shared"], "shared_float", to=TensorProto.FLOAT)
    body("Transpose", ["found"], "places", perm=[1, 0])  # [n, 1]
    body("ScatterND", ["sum_so_far", "places", "shared_float"], "sum_with_it", reduction="add")
    untyped = [onnx.ValueInfoProto(name=name) for name in ("sum_so_far", *(f"one_{name}" for name in scanned))]
    return helper.make_graph(body.nodes, "expert", untyped, [onnx.ValueInfoProto(name="sum_with_it")])


def _widened(body: Body, name: str) -> str:
    """One expert's matrix [N, K], of its numbers and scales."""
    unpack(body, f"one_{name}_weight", f"{name}_numbers")  # [N, K * bits / 8, 8 / bits]
    body("CastLike", [f"{name}_numbers", "hidden_states"], f"{name}_positive")
    body("Sub", [f"{name}_positive", "wide_half"], f"{name}_signed")
    body("Reshape", [f"{name}_signed", "in_blocks"], f"{name}_blocks")  # [N, G, BLOCK]
    body("Unsqueeze", [f"one_{name}_scales", "last"], f"{name}_scales_of_blocks")
    body("Mul", [f"{name}_blocks", f"{name}_scales_of_blocks"], f"{name}_scaled")
    return body("Reshape", [f"{name}_scaled", "end_to_end"], f"{name}_wide")
