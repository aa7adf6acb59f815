"""Before TensorRT's parser sees a graph: every node that it would refuse, or import as something else, is named with the fix.

The list is one of permissions. The parser ignores what it does not know of an op it knows (a window, a length, a soft cap), so an
engine may be wrong and never say so; therefore an op or attribute that is not listed here does not get through.
"""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from headfold.plugins.attention.schema import DOMAIN, INPUTS, NORMS, OP_TYPE, SCALES, VERSION, Attention, Attributes
from headfold.plugins.names import is_cache_input
from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.schema import FLOAT4_BLOCK
from headfold.runtime.errors import BuildError

_REPORT = "Please report it: no lowering of headfold makes it."
_EXPORT = "Export the bundle again with this version of headfold."
_UNROUNDED = "Build from a bundle that was exported without --weights, in --dtype float16."
_PLUGIN = "Use --attention plugin."
_DTYPES = {
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.BOOL,
}
_CACHES = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN}  # quantized ones, which go into the plugin and nowhere else
# Weights, which go into DequantizeLinear and nowhere else
_ROUNDED = {ir.DataType.INT4, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
_BLOCKS = {32, 64, 128}

# Ops that TensorRT imports as they are meant, with the attributes that it heeds.
_ALLOWED: dict[str, set[str]] = {
    "Add": set(),
    "And": set(),
    "Attention": {"scale"},
    "Cast": {"to", "saturate"},  # saturate concerns float8 only, which _DTYPES has not
    "CastLike": {"saturate"},
    "Clip": set(),
    "Concat": {"axis"},
    "Constant": {"value", "value_int", "value_ints", "value_float", "value_floats"},
    "Cos": set(),
    "DequantizeLinear": {"axis", "block_size"},
    "Div": set(),
    "Equal": set(),
    "Erf": set(),
    "Exp": set(),
    "Expand": set(),
    "Gather": {"axis"},
    "GatherElements": {"axis"},
    "Gelu": {"approximate"},
    "Gemm": {"alpha", "beta", "transA", "transB"},
    "Greater": set(),
    "GreaterOrEqual": set(),
    "Identity": set(),
    "LayerNormalization": {"axis", "epsilon", "stash_type"},
    "Less": set(),
    "LessOrEqual": set(),
    "MatMul": set(),
    "Max": set(),
    "Min": set(),
    "Mul": set(),
    "Neg": set(),
    "Not": set(),
    "Or": set(),
    "Pow": set(),
    "RMSNormalization": {"axis", "epsilon", "stash_type"},
    "Range": set(),
    "Reciprocal": set(),
    "ReduceMean": {"keepdims", "noop_with_empty_axes"},
    "ReduceMax": {"keepdims", "noop_with_empty_axes"},
    "ReduceMin": {"keepdims", "noop_with_empty_axes"},
    "ReduceSum": {"keepdims", "noop_with_empty_axes"},
    "Relu": set(),
    "Reshape": {"allowzero"},
    "RotaryEmbedding": {"interleaved", "rotary_embedding_dim"},
    "Shape": {"start", "end"},
    "Sigmoid": set(),
    "Sin": set(),
    "Slice": set(),
    "Split": {"axis", "num_outputs"},
    "Sqrt": set(),
    "Squeeze": set(),
    "Sub": set(),
    "Tanh": set(),
    "TensorScatter": {"axis", "mode"},
    "Transpose": {"perm"},
    "Unsqueeze": set(),
    "Where": set(),
}
_IGNORED = {  # what people would expect to work, and why it does not
    ("Attention", "is_causal"): (
        "TensorRT aligns a causal mask at the upper left, so decoding would see one token",
        "Give an explicit mask.",
    ),
    ("Attention", "softcap"): ("TensorRT ignores a soft cap", _PLUGIN),
    ("Attention", "left_window_size"): ("TensorRT ignores a sliding window", "Put the window into the mask."),
    ("Attention", "right_window_size"): ("TensorRT ignores a sliding window", "Put the window into the mask."),
    ("ArgMax", ""): ("TensorRT does not say which of equal elements it finds", _EXPORT),
}


def preflight(model: ir.Model, attention: Attention, where: Path) -> None:
    """Refuse a lowered graph that TensorRT would refuse or misread.

    Raises:
        BuildError: names the first such node, attribute or input, and the fix.
    """
    opset = model.opset_imports.get("", 0)
    if opset != OPSET:
        raise BuildError(f"has opset {opset}, and only {OPSET} is known to be read rightly", where=where, fix=_EXPORT)
    if model.functions:
        name = next(iter(model.functions))
        raise BuildError(f"still has the function {name[0]}::{name[1]}", where=where, fix=_REPORT)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        cached = is_cache_input(value.name) and value.dtype in _CACHES
        rounded = value.dtype in _ROUNDED and all(node.op_type == "DequantizeLinear" for node, _ in value.uses())
        if value.dtype not in _DTYPES and not cached and not rounded:
            raise BuildError(f"{value.name} is {value.dtype}, which TensorRT has not", where=where, fix=_EXPORT)
    inputs = {value.name for value in model.graph.inputs}
    for node in model.graph:
        problem = _problem(node, attention, inputs)
        if problem is not None:
            what, fix = problem
            raise BuildError(f"node {node.name or '?'} ({node.op_type}): {what}", where=where, fix=fix)
    wanted = {"native": ("", "Attention"), "plugin": (DOMAIN, OP_TYPE)}[attention]
    if not any((node.domain, node.op_type) == wanted for node in model.graph):
        raise BuildError(f"has no {wanted[1]} for --attention {attention}", where=where, fix=_EXPORT)


def _problem(node: ir.Node, attention: Attention, inputs: set[str | None]) -> tuple[str, str] | None:
    """What is wrong with a node, and the fix."""
    if node.domain == DOMAIN and node.op_type == OP_TYPE:
        return _plugin_node(node, attention)
    if node.domain == "com.microsoft":
        return "is an op of ONNX Runtime alone", "Build from a bundle that is not quantized for ONNX Runtime."
    if node.domain:
        return f"domain {node.domain} is unknown to TensorRT", _REPORT
    if (node.op_type, "") in _IGNORED:
        return _IGNORED[node.op_type, ""]
    if node.op_type not in _ALLOWED:
        return "is not among the ops whose meaning in TensorRT is known", _REPORT
    for name, attribute in node.attributes.items():
        if (node.op_type, name) in _IGNORED and attribute.value not in (0, 0.0, -1):
            return _IGNORED[node.op_type, name]
        if name not in _ALLOWED[node.op_type] and (node.op_type, name) not in _IGNORED:
            return f"attribute {name} is not among those that TensorRT is known to heed", _REPORT
    check = _CHECKS.get(node.op_type)
    return check(node, inputs) if check is not None else None


def _attention(node: ir.Node, _: set[str | None]) -> tuple[str, str] | None:
    given = [value is not None for value in node.inputs] + [False] * 7
    if given[6]:
        return "TensorRT ignores nonpad_kv_seqlen", "Put the lengths into the mask."
    if given[4] or given[5] or len(node.outputs) > 1:
        return "TensorRT's attention has no past and present", "Update the cache with TensorScatter before it."
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return "has no mask, and TensorRT would let every token see every other", "Give an explicit mask."
    if mask.dtype not in (None, ir.DataType.BOOL):
        return f"its mask is {mask.dtype}", "Give a boolean mask: True is visible."
    return None


def _tensor_scatter(node: ir.Node, inputs: set[str | None]) -> tuple[str, str] | None:
    cache = node.inputs[0]
    if node.attributes.get_string("mode", "linear") != "linear":
        return "TensorRT updates caches linearly only", "Use mode linear."
    if node.attributes.get_int("axis", -2) not in (-2, 2):
        return "TensorRT updates caches along axis -2 only", "Use axis -2."
    if cache is None or cache.name not in inputs:
        return "its cache is no input of the graph, so it cannot be updated in place", _EXPORT
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return "has no write indices", "Give them, one per sequence."
    if cache.shape is None or not isinstance(cache.shape[2], int):
        return f"the capacity of {cache.name} is dynamic, and TensorRT wants it static", "Give a capacity."
    if len(cache.uses()) > 1:
        return f"{cache.name} is read by another node too, while it is updated in place", _EXPORT
    return None


def _rotary(node: ir.Node, _: set[str | None]) -> tuple[str, str] | None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return "has no positions", "Give position_ids."
    x = node.inputs[0]
    if x is not None and x.shape is not None and len(x.shape) != 4:
        return "its input is not [batch, heads, tokens, head size]", _EXPORT
    return None


def _norm(node: ir.Node, _: set[str | None]) -> tuple[str, str] | None:
    if node.attributes.get_int("axis", -1) != -1:
        return "normalizes over other axes than the last", _EXPORT
    if node.attributes.get_int("stash_type", 1) != 1:
        return "TensorRT computes it in float32 whatever stash_type says", "Use stash_type 1."
    return None


def _cast(node: ir.Node, _: set[str | None]) -> tuple[str, str] | None:
    to = ir.DataType(node.attributes.get_int("to", 0))
    return (f"TensorRT has no {to}", _EXPORT) if to not in _DTYPES else None


def _dequantize(node: ir.Node, inputs: set[str | None]) -> tuple[str, str] | None:
    values, scales, *zeros = node.inputs
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if values is None or values.const_value is None or values.dtype not in _ROUNDED:
        return "TensorRT dequantizes int4, int8, float8 and float4 constants only", _REPORT
    if any(zero is not None for zero in zeros):
        return "TensorRT has no zero points", _REPORT
    if values.dtype == ir.DataType.FLOAT8E4M3FN:
        given = scales.const_value.shape.numpy() if scales is not None and scales.const_value is not None else None
        of_outputs = axis == 0 and given == values.const_value.shape.numpy()[:1]
        if block != 0 or not (of_outputs or given == ()):
            return "float8 has other scales than one, or one for each output", _REPORT
        return None
    if axis != 1 or len(values.const_value.shape) != 2:
        return f"has blocks in axis {axis}; TensorRT is known to read them in axis 1", _REPORT
    if values.dtype == ir.DataType.FLOAT4E2M1:
        own = scales.producer() if scales is not None else None
        if block != FLOAT4_BLOCK or own is None or own.op_type != "DequantizeLinear":
            return f"float4 has blocks of {block}; TensorRT wants {FLOAT4_BLOCK}, and scales in float8", _REPORT
        scales = own.inputs[0]
    elif block not in _BLOCKS:
        return f"has blocks of {block}; TensorRT is known to read blocks of 32, 64 or 128", _UNROUNDED
    rows, columns = values.const_value.shape.numpy()
    if scales is None or scales.const_value is None or scales.const_value.shape.numpy() != (rows, columns // block):
        return f"its scales are not [{rows}, {columns // block}]", _EXPORT
    return None


_CHECKS: dict[str, Callable[[ir.Node, set[str | None]], tuple[str, str] | None]] = {
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
    "RotaryEmbedding": _rotary,
    "RMSNormalization": _norm,
    "LayerNormalization": _norm,
    "Cast": _cast,
    "DequantizeLinear": _dequantize,
}


def _plugin_node(node: ir.Node, attention: Attention) -> tuple[str, str] | None:
    if attention == "native":
        return "is still the custom op, for which TensorRT has no layer", _PLUGIN
    known = set(vars(Attributes(1, 1, 1.0))) | {"plugin_namespace", "plugin_version"}
    unknown = sorted(set(node.attributes) - known)
    if unknown:
        return f"attribute {unknown[0]} is unknown to the plugin", _EXPORT
    names = node.attributes.get_string("plugin_namespace", ""), node.attributes.get_string("plugin_version", "")
    if names != (DOMAIN, str(VERSION)):
        return f"names the plugin {names[0] or '?'} version {names[1] or '?'}, not {DOMAIN} version {VERSION}", _REPORT
    norms_and_scales = len(node.inputs) - len(INPUTS)  # each has two
    if norms_and_scales not in (0, len(NORMS), len(NORMS) + len(SCALES)) or None in node.inputs:
        return f"has {len(node.inputs)} inputs", _EXPORT
    cache = node.inputs[INPUTS.index("past_key")]
    if cache is None or cache.shape is None or not isinstance(cache.shape[2], int):
        return "the capacity of its cache is dynamic, and TensorRT wants it static", "Give a capacity."
    return None
