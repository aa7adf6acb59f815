"""headfold::GroupedQueryAttention for ONNX: its operator schema, and the function bodies a graph can carry for it.

ONNX Runtime inlines `onnxruntime_body` and runs its own kernel; `standard_body` has only standard ops, for everybody else.
Both obey `headfold.plugins.schema`. A body belongs to one model: whether it has q/k norms, how much of a head RoPE rotates and how its
cache is stored are the same in all its layers.
"""

from collections.abc import Sequence

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema

from headfold.plugins.dtypes import DTYPES, FLOATS, QUANTIZED, Quantized
from headfold.plugins.schema import ALL_INPUTS, DOMAIN, INPUTS, LAST_INDEX, OP_TYPE, OUTPUTS, SCALES, VERSION

OPSET = 24  # of the default domain: the first with TensorScatter
_KINDS = {
    "num_heads": AttributeProto.INT,
    "kv_num_heads": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
    "local_window_size": AttributeProto.INT,
    "softcap": AttributeProto.FLOAT,
    "rotary_interleaved": AttributeProto.INT,
    "qk_norm_epsilon": AttributeProto.FLOAT,
}


def schema() -> OpSchema:
    """The operator's ONNX schema; not registered, so that no tool depends on headfold being imported."""
    types = {"past_lengths": "tensor(int64)", "total_sequence_length": "tensor(int32)", LAST_INDEX: "tensor(int32)"}
    types |= dict.fromkeys(SCALES, "tensor(float)")
    types |= dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), "T_CACHE")
    floats, narrow = ([f"tensor({DTYPES[name].onnxruntime})" for name in names] for names in (FLOATS, QUANTIZED))
    single, optional = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
    parameters = [OpSchema.FormalParameter(name, types.get(name, "T"), param_option=single) for name in INPUTS]
    parameters += [
        OpSchema.FormalParameter(name, types.get(name, "T"), param_option=optional)
        for name in ALL_INPUTS[len(INPUTS) :]
    ]
    kinds = {AttributeProto.INT: OpSchema.AttrType.INT, AttributeProto.FLOAT: OpSchema.AttrType.FLOAT}
    return OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter(name, types.get(name, "T")) for name in OUTPUTS],
        type_constraints=[
            ("T", floats, "weights and output"),
            ("T_CACHE", [*floats, *narrow], "T, or quantized with scales"),
        ],
        attributes=[OpSchema.Attribute(name, kinds[kind]) for name, kind in _KINDS.items()],
    )


class _Body:
    """Collects the nodes of a function; a value is known by the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        refs: dict[str, str] | None = None,
        domain: str = "",
        **attributes: object,
    ) -> str:
        """Append a node; `refs` maps its attributes to the function's. Returns the first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(op_type, inputs, names, domain=domain, **attributes)  # type: ignore[arg-type]
        for name, ref in (refs or {}).items():
            node.attribute.append(AttributeProto(name=name, ref_attr_name=ref, type=_KINDS[ref]))
        self.nodes.append(node)
        return names[0]

    def ints(self, name: str, *values: int) -> str:
        return self("Constant", [], name, value_ints=values)

    def function(self, domains: dict[str, int], quantized: bool) -> FunctionProto:
        inputs = [name for name in ALL_INPUTS if quantized or name not in SCALES]  # onnx.reference wants all of them
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        return helper.make_function(DOMAIN, OP_TYPE, inputs, list(OUTPUTS), self.nodes, opsets, list(_KINDS))


def onnxruntime_body(qk_norm: bool = False, head_dim: int = 0, cache: Quantized | None = None) -> FunctionProto:
    """One com.microsoft.GroupQueryAttention node, which takes the last valid index of each sequence, not past lengths.

    Its CPU kernel refuses q/k norms, so they are applied before it. `cache` is the dtype of a quantized cache, and
    needs `head_dim`: the kernel wants a scale per channel, and ONNX Runtime repeats ours once, when it loads the graph.
    """
    body = _Body()
    replaced = {"past_lengths": LAST_INDEX}
    if qk_norm:
        body("Constant", [], "flat", value_ints=[0, 0, -1])
        for name, heads in (("query", "num_heads"), ("key", "kv_num_heads")):
            _split_heads(body, name, heads)  # [B, S, H, D]
            _norm(body, f"{name}_heads", f"{name[0]}_norm_weight", f"{name}_normed")
            replaced[name] = body("Reshape", [f"{name}_normed", "flat"], f"{name}_flat")  # [B, S, H*D]
    inputs: list[str] = [replaced.get(name, name) for name in INPUTS]
    quantized: dict[str, object] = {}
    if cache is not None:
        body.ints("channels", 1, head_dim)
        body.ints("last_axis", 1)
        body.ints("all_channels", -1)
        for name in SCALES:
            body("Unsqueeze", [name, "last_axis"], f"{name}_column")  # [Hkv, 1]
            body("Expand", [f"{name}_column", "channels"], f"{name}_channels")  # [Hkv, D]
            replaced[name] = body("Reshape", [f"{name}_channels", "all_channels"], f"{name}_flat")  # [Hkv*D]
        inputs += ["", "", "", *(replaced[name] for name in SCALES)]  # no position ids, bias or sinks
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    body(
        "GroupQueryAttention",
        inputs,
        OUTPUTS,
        domain="com.microsoft",
        do_rotary=1,
        refs={name: name for name in _KINDS if name != "qk_norm_epsilon"},
        **quantized,
    )
    return body.function({"": OPSET, "com.microsoft": 1}, quantized=cache is not None)


def standard_body(
    rotary_dim: int, qk_norm: bool = False, cache: Quantized | None = None, zeroed: bool = False
) -> FunctionProto:
    """TensorScatter, RotaryEmbedding and Attention of opset 24 under an explicit mask; no contrib ops.

    `rotary_dim` is R, `cache` the dtype of a quantized cache: it may then also be kept in a wider dtype that holds the same numbers,
    for tools that cannot compute with the narrow one. `zeroed`: who runs it zeroes a new cache, so that what lies behind a sequence's
    last token is always a number; otherwise it is read as zero, for even masked, NaN would be seen.

    The mask is explicit because importers differ in what they make of Attention's causal and length inputs.
    """
    body = _Body()
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
    for name, heads in (("query", "num_heads"), ("key", "kv_num_heads"), ("value", "kv_num_heads")):
        current = _split_heads(body, name, heads)  # [B, S, H, D]
        if qk_norm and name != "value":
            current = _norm(body, current, f"{name[0]}_norm_weight", f"{name}_normed")
        current = body("Transpose", [current], f"{name}_by_head", perm=[0, 2, 1, 3])  # [B, H, S, D]
        if name != "value":
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
    for name, new, seen in (("key", "key_rotated", "keys"), ("value", "value_by_head", "values")):
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
    body(
        "Attention",
        ["query_rotated", "keys", "values", "mask"],
        "by_head",
        refs={"scale": "scale", "softcap": "softcap"},
    )
    body("Transpose", ["by_head"], "by_token", perm=[0, 2, 1, 3])  # [B, S, Hq, D]
    body("Reshape", ["by_token", "flat"], "output")  # [B, S, Hq*D]
    return body.function({"": OPSET}, quantized=cache is not None)


def _split_heads(body: _Body, name: str, heads: str) -> str:
    """[B, S, H*D] to [B, S, H, D]; the number of heads is an attribute of the function."""
    body("Constant", [], f"{name}_count", refs={"value_int": heads})
    body("Constant", [], f"{name}_same", value_ints=[0, 0])
    body("Constant", [], f"{name}_axis", value_ints=[0])
    body("Constant", [], f"{name}_rest", value_ints=[-1])
    body("Unsqueeze", [f"{name}_count", f"{name}_axis"], f"{name}_count_vector")
    body("Concat", [f"{name}_same", f"{name}_count_vector", f"{name}_rest"], f"{name}_shape", axis=0)
    return body("Reshape", [name, f"{name}_shape"], f"{name}_heads")


def _quantized(body: _Body, name: str, new: str, cache: Quantized) -> str:
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


def _norm(body: _Body, x: str, weight: str, output: str) -> str:
    return body("RMSNormalization", [x, weight], output, refs={"epsilon": "qk_norm_epsilon"}, axis=-1)
