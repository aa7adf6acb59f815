"""headfold::GroupedQueryAttention for ONNX: its operator schema, and the function bodies a graph can carry for it.

ONNX Runtime inlines `onnxruntime_body` and runs its own kernel; `standard_body` has only standard ops, for everybody else.
Both obey `headfold.plugins.attention.schema`. A body belongs to one model: whether it has q/k norms or sinks, how much of a head
RoPE rotates, how its cache is stored and whether its inputs are packed are the same in all its layers.
"""

from collections.abc import Sequence

from onnx import FunctionProto, TensorProto
from onnx.defs import OpSchema

from headfold.plugins.attention.schema import (
    ALL_INPUTS,
    DOMAIN,
    INPUTS,
    LAST_INDEX,
    OP_TYPE,
    OUTPUTS,
    SCALES,
    SINK,
    TABLES,
    VERSION,
    AttentionInputs,
    Attributes,
)
from headfold.plugins.dtypes import DTYPES, FLOATS, QUANTIZED, Quantized
from headfold.plugins.onnx_body import OPSET, Body, Operator

_HEADS = {"query": "num_heads", "key": "kv_num_heads", "value": "kv_num_heads"}
_SINK_INPUT = 11  # of com.microsoft.GroupQueryAttention
_OPERATOR = Operator(DOMAIN, OP_TYPE, VERSION, AttentionInputs, Attributes, OUTPUTS)


def schema() -> OpSchema:
    """The operator's ONNX schema."""
    types = {"past_lengths": "tensor(int64)", "total_sequence_length": "tensor(int32)", LAST_INDEX: "tensor(int32)"}
    types |= dict.fromkeys(SCALES, "tensor(float)")
    types |= dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), "T_CACHE")
    floats, narrow = ([f"tensor({DTYPES[name].onnxruntime})" for name in names] for names in (FLOATS, QUANTIZED))
    constraints = [("T", floats, "weights and output"), ("T_CACHE", [*floats, *narrow], "T, or quantized with scales")]
    return _OPERATOR.schema(types, constraints)


def onnxruntime_body(
    qk_norm: bool = False,
    head_dim: int = 0,
    cache: Quantized | None = None,
    *,
    rotary: bool = True,
    sinks: bool = False,
    packed: bool = False,
) -> FunctionProto:
    """One com.microsoft.GroupQueryAttention node, which takes the last valid index of each sequence, not past lengths.

    Its CPU kernel refuses q/k norms, so they are applied before it. `cache` is the dtype of a quantized cache, and
    needs `head_dim`: the kernel wants a scale per channel, and ONNX Runtime repeats ours once, when it loads the graph.
    `rotary` and `sinks` tell whether the nodes have rotary tables and sinks, `packed` whether they lack keys and values.
    """
    body = Body(_OPERATOR)
    replaced = {"past_lengths": LAST_INDEX} | (dict.fromkeys(("key", "value"), "") if packed else {})
    if qk_norm:
        body("Constant", [], "flat", value_ints=[0, 0, -1])
        for name, heads in (("query", "num_heads"), ("key", "kv_num_heads")):
            _split_heads(body, name, heads)  # [B, S, H, D]
            _norm(body, f"{name}_heads", f"{name[0]}_norm_weight", f"{name}_normed")
            replaced[name] = body("Reshape", [f"{name}_normed", "flat"], f"{name}_flat")  # [B, S, H*D]
    inputs: list[str] = [replaced.get(name, name) for name in INPUTS if rotary or name not in TABLES]
    if sinks or cache is not None:
        inputs += [""] * (_SINK_INPUT - len(inputs)) + [SINK if sinks else ""]  # no position ids, no bias
    quantized: dict[str, object] = {}
    if cache is not None:
        body.ints("channels", 1, head_dim)
        body.ints("last_axis", 1)
        body.ints("all_channels", -1)
        for name in SCALES:
            body("Unsqueeze", [name, "last_axis"], f"{name}_column")  # [Hkv, 1]
            body("Expand", [f"{name}_column", "channels"], f"{name}_channels")  # [Hkv, D]
            replaced[name] = body("Reshape", [f"{name}_channels", "all_channels"], f"{name}_flat")  # [Hkv*D]
        inputs += [replaced[name] for name in SCALES]
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    body(
        "GroupQueryAttention",
        inputs,
        OUTPUTS,
        domain="com.microsoft",
        do_rotary=int(rotary),
        refs={name: name for name in _OPERATOR.kinds if name != "qk_norm_epsilon"},
        **quantized,
    )
    return body.function({"": OPSET, "com.microsoft": 1}, _inputs(cache is not None, sinks))


def standard_body(
    rotary_dim: int,
    qk_norm: bool = False,
    cache: Quantized | None = None,
    zeroed: bool = False,
    *,
    sinks: bool = False,
    packed: bool = False,
) -> FunctionProto:
    """TensorScatter, RotaryEmbedding and Attention of opset 24 under an explicit mask; no contrib ops.

    `rotary_dim` is R, 0 for nodes without rotary tables; `sinks` tells whether they have sinks, which then must not have a soft
    cap: the Attention op would cap them too; `packed` whether they lack keys and values. `cache` is the dtype of a quantized cache: it
    may then also be kept in a wider dtype that holds the same numbers, for tools that cannot compute with the narrow one. `zeroed`: who
    runs it zeroes a new cache, so that what lies behind a sequence's last token is always a number; otherwise it is read as zero, for
    even masked, NaN would be seen.

    The mask is explicit because importers differ in what they make of Attention's causal and length inputs.
    """
    body = Body(_OPERATOR)
    for name, values in {
        "zero": [0],
        "one": [1],
        "axes": [0, 2],
        "behind": [1, 3],
        "seq_axis": [2],
        "flat": [0, 0, -1],
    }.items():
        body.ints(name, *values)
    body("Constant", [], "zero_scalar", value_int=0)
    body("Constant", [], "one_scalar", value_int=1)
    # Positions of the new tokens, [B, S]
    body("Shape", ["query"], "new_tokens", start=1, end=2)
    body("Squeeze", ["new_tokens", "zero"], "new_tokens_scalar")
    body("Range", ["zero_scalar", "new_tokens_scalar", "one_scalar"], "offsets")  # [S]
    body("Unsqueeze", ["past_lengths", "one"], "past_column")  # [B, 1]
    body("Add", ["past_column", "offsets"], "positions")  # [B, S]
    # Heads, norms, RoPE, [B, H, S, D]
    if packed:
        _unpack(body)
    for name, heads in _HEADS.items():
        current = f"{name}_heads" if packed else _split_heads(body, name, heads)  # [B, S, H, D]
        if qk_norm and name != "value":
            current = _norm(body, current, f"{name[0]}_norm_weight", f"{name}_normed")
        current = body("Transpose", [current], f"{name}_by_head", perm=[0, 2, 1, 3])  # [B, H, S, D]
        if name != "value" and rotary_dim:
            tables = ["cos_cache", "sin_cache", "positions"]
            refs = {"interleaved": "rotary_interleaved"}
            body("RotaryEmbedding", [current, *tables], f"{name}_rotated", refs=refs, rotary_embedding_dim=rotary_dim)
    # Only the first T positions can be visible
    body("Cast", ["total_sequence_length"], "total", to=TensorProto.INT64)
    body("Unsqueeze", ["total", "zero"], "total_vector")  # [1]
    body("Range", ["zero_scalar", "total", "one_scalar"], "key_positions")  # [T]
    if not zeroed:
        body("Add", ["past_column", "new_tokens"], "ends")  # [B, 1]
        body("Less", ["key_positions", "ends"], "written_tokens")  # [B, T]
        body("Unsqueeze", ["written_tokens", "behind"], "written")  # [B, 1, T, 1]
        body("Constant", [], "nothing_float", value_float=0.0)
        body("CastLike", ["nothing_float", "query"], "nothing")
    query, new_key = ("query_rotated", "key_rotated") if rotary_dim else ("query_by_head", "key_by_head")
    for name, new, seen in (("key", new_key, "keys"), ("value", "value_by_head", "values")):
        stored = new if cache is None else _quantized(body, name, new, cache)
        body("TensorScatter", [f"past_{name}", stored, "past_lengths"], f"present_{name}", axis=-2)  # [B, Hkv, C, D]
        read = seen if zeroed else f"{name}_read"
        if cache is None:
            body("Slice", [f"present_{name}", "zero", "total_vector", "seq_axis"], read)  # [B, Hkv, T, D]
        else:
            body("Cast", [f"present_{name}"], f"{name}_wide", to=TensorProto.FLOAT)
            body("Slice", [f"{name}_wide", "zero", "total_vector", "seq_axis"], f"{name}_seen")
            body("Mul", [f"{name}_seen", f"{name}_scale_by_head"], f"{name}_real")
            body("CastLike", [f"{name}_real", "query"], read)
        if not zeroed:
            body("Where", ["written", read, "nothing"], seen)
    # A token sees itself and what is at most window - 1 before it
    body("Unsqueeze", ["positions", "behind"], "query_positions")  # [B, 1, S, 1]
    body("Sub", ["query_positions", "key_positions"], "distance")  # [B, 1, S, T]
    body("Constant", [], "window", refs={"value_int": "local_window_size"})
    body("Constant", [], "no_limit", value_int=2**62)
    body("Greater", ["window", "zero_scalar"], "has_window")
    body("Where", ["has_window", "window", "no_limit"], "limit")
    body("GreaterOrEqual", ["distance", "zero_scalar"], "causal")
    body("Less", ["distance", "limit"], "near")
    body("And", ["causal", "near"], "mask")
    attended = ("keys", "values", "mask")
    if sinks:
        attended = _with_sinks(body, query, *attended)
    body(
        "Attention",
        [query, *attended],
        "by_head",
        refs={"scale": "scale", "softcap": "softcap"},
    )
    body("Transpose", ["by_head"], "by_token", perm=[0, 2, 1, 3])  # [B, S, Hq, D]
    body("Reshape", ["by_token", "flat"], "output")  # [B, S, Hq*D]
    return body.function({"": OPSET}, _inputs(cache is not None, sinks))


def _inputs(quantized: bool, sinks: bool) -> Sequence[str]:
    """Those up to the last one that is used; onnx.reference wants a node to have all of them."""
    last = SINK if sinks else SCALES[-1] if quantized else LAST_INDEX
    return ALL_INPUTS[: ALL_INPUTS.index(last) + 1]


def _split_heads(body: Body, name: str, heads: str) -> str:
    """[B, S, H*D] to [B, S, H, D]; the number of heads is an attribute of the function."""
    body("Constant", [], f"{name}_same", value_ints=[0, 0])
    body("Constant", [], f"{name}_rest", value_ints=[-1])
    body("Concat", [f"{name}_same", _count(body, name, heads), f"{name}_rest"], f"{name}_shape", axis=0)
    return body("Reshape", [name, f"{name}_shape"], f"{name}_heads")


def _count(body: Body, name: str, heads: str) -> str:
    """The number of heads as a vector [1]."""
    body("Constant", [], f"{name}_count", refs={"value_int": heads})
    body("Constant", [], f"{name}_axis", value_ints=[0])
    return body("Unsqueeze", [f"{name}_count", f"{name}_axis"], f"{name}_count_vector")


def _unpack(body: Body) -> None:
    """[B, S, (Hq + 2 Hkv)*D] to the heads of queries, keys and values, [B, S, H, D] each."""
    body.ints("packed_same", 0, 0, -1)
    body("Shape", ["past_key"], "head_size", start=3, end=4)
    body("Concat", ["packed_same", "head_size"], "packed_shape", axis=0)
    body("Reshape", ["query", "packed_shape"], "packed_heads")  # [B, S, Hq + 2 Hkv, D]
    body("Concat", [_count(body, name, heads) for name, heads in _HEADS.items()], "packed_counts", axis=0)
    body("Split", ["packed_heads", "packed_counts"], [f"{name}_heads" for name in _HEADS], axis=2)


def _with_sinks(body: Body, query: str, keys: str, values: str, mask: str) -> tuple[str, str, str]:
    """A sink is a key and a value of zeros [B, Hkv, 1, D] behind all others; the mask, now a number to add, is its logit.

    Returns keys, values and mask [B, Hq, S, T+1].
    """
    body.ints("sink_last", -1)
    body.ints("sink_end", 2**62)
    body.ints("sink_axes", 0, 2, 3)
    body.ints("tokens_axis", 2)
    with_sink = []
    for name in (keys, values):
        body("Slice", [name, "sink_last", "sink_end", "tokens_axis"], f"{name}_last")
        body("Sub", [f"{name}_last", f"{name}_last"], f"{name}_zero")
        with_sink.append(body("Concat", [name, f"{name}_zero"], f"{name}_with_sink", axis=2))
    body("Constant", [], "visible_float", value_float=0.0)
    body("Constant", [], "hidden_float", value_float=float("-inf"))
    body("CastLike", ["visible_float", query], "visible_bias")
    body("CastLike", ["hidden_float", query], "hidden_bias")
    body("Where", [mask, "visible_bias", "hidden_bias"], "bias")  # [B, 1, S, T]
    body("Unsqueeze", [SINK, "sink_axes"], "sink_by_head")  # [1, Hq, 1, 1]
    body("Shape", [query], "bias_rows", start=0, end=3)  # B, Hq, S
    body("Shape", ["bias"], "bias_columns", start=3, end=4)  # T
    body("Concat", ["bias_rows", "bias_columns"], "bias_shape", axis=0)
    body("Concat", ["bias_rows", "one"], "sink_shape", axis=0)
    body("Expand", ["bias", "bias_shape"], "bias_by_head")
    body("Expand", ["sink_by_head", "sink_shape"], "sink_bias")
    body("Concat", ["bias_by_head", "sink_bias"], "bias_with_sink", axis=3)
    return with_sink[0], with_sink[1], "bias_with_sink"


def _quantized(body: Body, name: str, new: str, cache: Quantized) -> str:
    """What the cache stores of the new keys or values [B, Hkv, S, D]."""
    body("Constant", [], f"{name}_trailing", value_ints=[1, 2])
    body("Unsqueeze", [f"{name}_scale", f"{name}_trailing"], f"{name}_scale_by_head")  # [Hkv, 1, 1]
    body("Cast", [new], f"{name}_new", to=TensorProto.FLOAT)
    current = body("Div", [f"{name}_new", f"{name}_scale_by_head"], f"{name}_divided")
    if cache == "int8":
        current = body("Round", [current], f"{name}_rounded")  # half to even
    least, most = QUANTIZED[cache]
    body("Constant", [], f"{name}_least", value_float=least)
    body("Constant", [], f"{name}_most", value_float=most)
    body("Clip", [current, f"{name}_least", f"{name}_most"], f"{name}_held")
    body("Cast", [f"{name}_held"], f"{name}_narrow", to=DTYPES[cache].onnx)
    return body("CastLike", [f"{name}_narrow", f"past_{name}"], f"{name}_stored")


def _norm(body: Body, x: str, weight: str, output: str) -> str:
    return body("RMSNormalization", [x, weight], output, refs={"epsilon": "qk_norm_epsilon"}, axis=-1)
