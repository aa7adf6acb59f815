"""Everything that TensorRT's parser would refuse or silently drop is named before the parser sees it."""

from collections.abc import Callable

import onnx_ir as ir
import pytest

from headfold.export.engine.lowering import lower
from headfold.export.engine.preflight import preflight
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import MODEL

CAPACITY = 24


def node(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def attribute(op_type: str, value: ir.Attr) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node(model, op_type).attributes[value.name] = value

    return change


def extra_inputs(op_type: str, position: int) -> Callable[[ir.Model], None]:
    """Give the node one more input at that position, and nothing in between."""

    def change(model: ir.Model) -> None:
        target, source = node(model, op_type), model.graph.inputs[0]
        target.resize_inputs(position + 1)
        target.replace_input_with(position, source)

    return change


def without_mask(model: ir.Model) -> None:
    node(model, "Attention").resize_inputs(3)


def float_mask(model: ir.Model) -> None:
    mask = node(model, "Attention").inputs[3]
    assert mask is not None
    mask.dtype = ir.DataType.FLOAT16


def renamed(op_type: str, domain: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        target = node(model, "Sigmoid" if op_type != "ArgMax" else "Shape")
        target.op_type, target.domain = op_type, domain
        target.attributes.clear()

    return change


def opset(model: ir.Model) -> None:
    model.opset_imports[""] = 25


def dynamic_capacity(model: ir.Model) -> None:
    value = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    assert value.shape is not None
    value.shape = ir.Shape([*value.shape[:2], "capacity", *value.shape[3:]])


def cache_from_elsewhere(model: ir.Model) -> None:
    scatter = node(model, "TensorScatter")
    scatter.replace_input_with(0, scatter.inputs[1])


def cache_read_twice(model: ir.Model) -> None:
    cache = node(model, "TensorScatter").inputs[0]
    node(model, "Sigmoid").replace_input_with(0, cache)


def double(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.DOUBLE


NATIVE = {
    "causal": (attribute("Attention", ir.AttrInt64("is_causal", 1)), "aligns a causal mask at the upper left"),
    "soft cap": (attribute("Attention", ir.AttrFloat32("softcap", 30.0)), "ignores a soft cap. Use --attention plugin"),
    "window": (attribute("Attention", ir.AttrInt64("left_window_size", 4)), "ignores a sliding window"),
    "unknown attribute": (attribute("Attention", ir.AttrInt64("qk_matmul_output_mode", 2)), "qk_matmul_output_mode"),
    "lengths": (extra_inputs("Attention", 6), "ignores nonpad_kv_seqlen"),
    "past": (extra_inputs("Attention", 4), "no past and present"),
    "no mask": (without_mask, "has no mask"),
    "float mask": (float_mask, "its mask is FLOAT16"),
    "contrib op": (renamed("FusedMatMul", "com.microsoft"), "op of ONNX Runtime alone"),
    "foreign domain": (renamed("Thing", "example"), "domain example is unknown"),
    "unknown op": (renamed("Einsum", ""), "not among the ops whose meaning"),
    "ArgMax": (renamed("ArgMax", ""), "which of equal elements"),
    "opset": (opset, "has opset 25"),
    "dynamic capacity": (dynamic_capacity, "capacity of past_key_values.0.key is dynamic"),
    "cache that is no input": (cache_from_elsewhere, "its cache is no input"),
    "cache read twice": (cache_read_twice, "read by another node too"),
    "circular cache": (attribute("TensorScatter", ir.AttrString("mode", "circular")), "linearly only"),
    "cache axis": (attribute("TensorScatter", ir.AttrInt64("axis", 1)), "along axis -2 only"),
    "stash type": (attribute("RMSNormalization", ir.AttrInt64("stash_type", 10)), "whatever stash_type says"),
    "norm axis": (attribute("RMSNormalization", ir.AttrInt64("axis", 1)), "other axes than the last"),
    "double": (double, "is DOUBLE, which TensorRT has not"),
}
PLUGIN = {
    "no namespace": (attribute("GroupedQueryAttention", ir.AttrString("plugin_namespace", "")), "names the plugin ?"),
    "version": (attribute("GroupedQueryAttention", ir.AttrString("plugin_version", "7")), "version 7"),
    "attribute": (attribute("GroupedQueryAttention", ir.AttrInt64("sinks", 1)), "attribute sinks is unknown"),
}


@pytest.mark.parametrize("attention", ["native", "plugin"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lowered_graphs_pass(attention, dtype, tensorrt_toy) -> None:
    path = tensorrt_toy(dtype).bundle / MODEL
    preflight(lower(path, attention, CAPACITY), attention, path)


@pytest.mark.parametrize(
    ("attention", "case"), [("native", case) for case in NATIVE] + [("plugin", case) for case in PLUGIN]
)
def test_names_what_tensorrt_would_misread(attention, case, tensorrt_toy) -> None:
    path = tensorrt_toy("float16").bundle / MODEL
    model = lower(path, attention, CAPACITY)
    change, message = (NATIVE | PLUGIN)[case]
    change(model)
    with pytest.raises(BuildError) as error:
        preflight(model, attention, path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_other_kind_of_attention_is_refused(tensorrt_toy) -> None:
    path = tensorrt_toy("float16").bundle / MODEL
    with pytest.raises(BuildError, match="is still the custom op"):
        preflight(lower(path, "plugin", CAPACITY), "native", path)
    with pytest.raises(BuildError, match="has no GroupedQueryAttention"):
        preflight(lower(path, "native", CAPACITY), "plugin", path)
