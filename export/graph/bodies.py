"""Exchange what implements an op of ours: what makes one master serve every backend."""

from collections.abc import Collection
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from headfold.export.graph.experts import attributes_of, experts_nodes
from headfold.export.graph.passes import attention_nodes, columns
from headfold.export.graph.recipes import recipe_of, shared_constant
from headfold.export.model.storing import whole_name
from headfold.plugins.attention.onnx_functions import onnxruntime_body, standard_body
from headfold.plugins.attention.schema import ALL_INPUTS, DOMAIN, LAST_INDEX, TABLES, VERSION, AttentionInputs
from headfold.plugins.dtypes import DTYPES, QUANTIZED, Quantized
from headfold.plugins.experts import onnx_functions as experts_functions
from headfold.plugins.experts.schema import OP_TYPE as EXPERTS
from headfold.plugins.experts.schema import QUANTIZED as QUANTIZED_EXPERTS
from headfold.plugins.experts.schema import ExpertsInputs, QuantizedExpertsAttributes
from headfold.plugins.quantized.onnx_functions import (
    exact_rounded_matmul,
    float8_matmul,
    gather,
    onnxruntime_matmul,
    onnxruntime_rounded_matmul,
    standard_matmul,
    standard_rounded_matmul,
)
from headfold.plugins.quantized.schema import FLOAT8, GATHER, MATMUL, MATMUL_INPUTS, ROUNDED, Bits, Level
from headfold.runtime.errors import ConfigError


def set_body(model: ir.Model, function: onnx.FunctionProto) -> None:
    """Give an op of ours this body in place of the one the graph has."""
    body = cast(ir.Function, ir.from_proto(function))
    model.functions[body.identifier()] = body
    model.opset_imports[DOMAIN] = VERSION
    needed = {domain: version for f in model.functions.values() for domain, version in f.opset_imports.items()}
    for domain, version in needed.items():
        model.opset_imports.setdefault(domain, version)
    for domain in set(model.opset_imports) - {"", DOMAIN, *needed}:
        del model.opset_imports[domain]  # of the body that went


def use_standard_body(model: ir.Model, zeroed: bool = False) -> None:
    """Give the attention op the body of standard ops; `zeroed` as there."""
    inputs = _inputs(model)
    rotary_dim = 2 * columns(inputs.cos_cache) if inputs.cos_cache is not None else 0
    sinks, packed, norms = inputs.head_sink is not None, inputs.packed, inputs.norms is not None
    set_body(model, standard_body(rotary_dim, norms, _stored(inputs), zeroed, sinks=sinks, packed=packed))


def onnxruntime_can(model: ir.Model) -> bool:
    """Whether its kernel takes the sizes of all layers: of heads, and of what is rotated of them."""
    layers = [AttentionInputs[ir.Value | None].of_node(node.inputs) for node in attention_nodes(model)]
    sizes = [columns(layer.past_key) for layer in layers]
    sizes += [2 * columns(layer.cos_cache) for layer in layers if layer.cos_cache is not None]
    return all(size % 16 == 0 for size in sizes)


def use_onnxruntime_body(model: ir.Model) -> None:
    """Give the attention op the body that is ONNX Runtime's own kernel."""
    inputs = _inputs(model)
    body = onnxruntime_body(
        inputs.norms is not None,
        columns(inputs.past_key),
        _stored(inputs),
        rotary=inputs.tables is not None,
        sinks=inputs.head_sink is not None,
        packed=inputs.packed,
    )
    set_body(model, body)


def _inputs(model: ir.Model) -> AttentionInputs[ir.Value]:
    """Those of the first layer; which ones there are is the same in all of them."""
    return AttentionInputs.of_node(attention_nodes(model)[0].inputs)


def _stored(inputs: AttentionInputs[ir.Value]) -> Quantized | None:
    """The dtype of a quantized cache."""
    assert inputs.past_key is not None
    return {DTYPES[name].onnx: name for name in QUANTIZED}.get(int(inputs.past_key.dtype or 0))


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
    """Leave the attention op in place, but as a call of the plugin of its name; capacities must be static.

    `total_sequence_length` is a number on the host, which a plugin cannot have; but it can see its inputs' shapes. So that input
    becomes `attention_mask` [B, T], of which only T counts. `last_index` is ONNX Runtime's alone. The plugin always rotates: an op
    without tables gets tables of no turn, which change no bit.
    """
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    for node in attention_nodes(model):
        inputs = AttentionInputs.of_node(node.inputs)
        given = inputs.given() | {"total_sequence_length": mask}
        if inputs.tables is None:
            given |= _tables_of_no_turn(model, inputs)
        values = [given[name] for name in ALL_INPUTS if name in given and name != LAST_INDEX]
        node.resize_inputs(len(values))
        for position, value in enumerate(values):
            node.replace_input_with(position, value)
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(VERSION))
    model.functions.clear()
    for domain in set(model.opset_imports) - {"", DOMAIN}:
        del model.opset_imports[domain]


def _tables_of_no_turn(model: ir.Model, inputs: AttentionInputs[ir.Value]) -> dict[str, ir.Value]:
    """Cosines of 1 and sines of 0, [C, 1]: R is 2."""
    assert inputs.past_key is not None
    assert inputs.past_key.shape is not None
    dtype, capacity = inputs.query.dtype, inputs.past_key.shape[2]
    assert dtype is not None
    assert isinstance(capacity, int)
    return {
        name: shared_constant(model, f"no_turn.{name}", np.full((capacity, 1), number, dtype.numpy()), dtype)
        for name, number in zip(TABLES, (1, 0), strict=True)
    }


def quantized_products(model: ir.Model) -> list[ir.Node]:
    """The products with matrices of four or eight bits."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == MATMUL]


def use_quantized_bodies(model: ir.Model, standard: bool = False) -> None:
    """Give the ops of such matrices their bodies: ONNX Runtime's kernel, or standard ops. Nothing without them.

    Standard ops want zero points of all products or of none: those without get the ones that they have by default.
    """
    products, used = quantized_products(model), _own_ops(model)
    zeros = any(len(node.inputs) == len(MATMUL_INPUTS) for node in products)
    if MATMUL in used:
        set_body(model, standard_matmul(zeros) if standard else onnxruntime_matmul())
    if ROUNDED in used:
        set_body(model, standard_rounded_matmul() if standard else onnxruntime_rounded_matmul())
    if FLOAT8 in used:
        set_body(model, float8_matmul())
    if GATHER in used:
        lookups = [node for node in model.graph if node.domain == DOMAIN and node.op_type == GATHER]
        set_body(model, gather(eight=all(node.attributes["bits"].as_int() == 8 for node in lookups)))
    for node in products if standard and zeros else ():
        if len(node.inputs) < len(MATMUL_INPUTS):
            scales, bits = node.inputs[MATMUL_INPUTS.index("scales")], node.attributes["bits"].as_int()
            assert scales is not None
            rows, blocks = (int(dim) for dim in scales.shape or ())  # type: ignore[arg-type]  # of a weight: numbers
            shape, byte = (rows, -(-blocks * bits // 8)), 0x88 if bits == 4 else 0x80
            default = shared_constant(model, f"zeros.int{bits}.{rows}.{shape[1]}", np.full(shape, byte, np.uint8))
            node.resize_inputs(len(MATMUL_INPUTS))
            node.replace_input_with(MATMUL_INPUTS.index("zeros"), default)


def use_experts_bodies(model: ir.Model) -> None:
    """Give mixtures of experts their bodies: ONNX Runtime's kernel where that has it, otherwise standard ops. Nothing without experts.

    With eight bits it has to be kept from rounding inputs where they are not to be.

    Raises:
        ConfigError: the layers' experts differ in what a body is made for.
    """
    nodes, bodies = experts_nodes(model), dict[str, onnx.FunctionProto]()
    exact = any(_rounds_all_the_same(node) for node in nodes)
    for node in nodes:
        body = _experts_body(node, exact)
        if bodies.setdefault(node.op_type, body) != body:
            raise ConfigError("the experts of its layers have different activations", fix="headfold wants them alike.")
    for op_type in (EXPERTS, QUANTIZED_EXPERTS):
        model.functions.pop((DOMAIN, op_type, ""), None)
    for body in bodies.values():
        set_body(model, body)


def _rounds_all_the_same(node: ir.Node) -> bool:
    match attributes_of(node):
        case QuantizedExpertsAttributes(bits=8, accuracy_level=1):
            return True
    return False


def _experts_body(node: ir.Node, exact: bool) -> onnx.FunctionProto:
    attributes, inputs = attributes_of(node), ExpertsInputs[ir.Value | None].of_node(node.inputs)
    quantized = node.op_type == QUANTIZED_EXPERTS
    if not experts_functions.onnxruntime_can(attributes):
        return experts_functions.standard_body(attributes, inputs.gate_up_bias is not None)
    return experts_functions.onnxruntime_quantized_body(exact) if quantized else experts_functions.onnxruntime_body()


def block_sums(model: ir.Model, tape: ir.tape.Tape, x: ir.Value, block: int) -> ir.Value:
    """Of x [..., K] the sum of each block, [..., K / block]: what multiplies the offsets of a matrix's blocks."""
    last = shared_constant(model, "blocks.last", np.array([-1]))
    return tape.op("ReduceSum", [in_blocks(model, tape, x, block), last], {"keepdims": 0})


def in_blocks(model: ir.Model, tape: ir.tape.Tape, x: ir.Value, block: int) -> ir.Value:
    """x [..., K] as [..., K / block, block]."""
    assert x.shape is not None
    shape = [0] * (len(x.shape) - 1) + [-1, block]
    return tape.op("Reshape", [x, shared_constant(model, "shape." + ".".join(map(str, shape)), np.array(shape))])


def set_level(
    model: ir.Model, level: Level, bits: Collection[Bits] = (4, 8), names: Collection[str] | None = None
) -> bool:
    """Have products with matrices of so many bits compute at this level, experts' too; whether there are any.

    All of them, or those with one of the weights of these names.
    """
    products = [node for node in _leveled(model) if node.attributes["bits"].as_int() in bits]
    if names is not None:
        products = [node for node in products if not _weights_of(node).isdisjoint(names)]
    for node in products:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    if any(node.op_type == QUANTIZED_EXPERTS for node in products):
        use_experts_bodies(model)
    return bool(products)


def _weights_of(node: ir.Node) -> set[str]:
    recipes = [recipe_of(value) for value in node.inputs if value is not None]
    return {whole_name(source) for recipe in recipes if recipe is not None for source in recipe.sources}


def levels(model: ir.Model) -> set[int]:
    """Those at which they compute."""
    return {node.attributes.get_int("accuracy_level", 4) for node in _leveled(model)}


def _leveled(model: ir.Model) -> list[ir.Node]:
    """Products with matrices of four or eight bits, and experts of such ones."""
    experts = [node for node in experts_nodes(model) if node.op_type == QUANTIZED_EXPERTS]
    return [*quantized_products(model), *experts]


def rounds_inputs(model: ir.Model) -> bool:
    """Whether there are products that round their inputs by themselves, not by a level."""
    return ROUNDED in _own_ops(model)


def _own_ops(model: ir.Model) -> set[str]:
    """Those of ours that are in the graph."""
    return {node.op_type for node in model.graph if node.domain == DOMAIN}


def round_no_inputs(model: ir.Model, late: bool = False) -> bool:
    """Have all products with matrices of few bits compute with their inputs as they are; whether there are any.

    If `late`, bodies that make a matrix wide wait for the input that it multiplies.
    """
    rounding = rounds_inputs(model)
    if rounding:
        set_body(model, exact_rounded_matmul(late))
    if late and FLOAT8 in _own_ops(model):
        set_body(model, float8_matmul(late))
    return set_level(model, 1) or rounding
