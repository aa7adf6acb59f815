"""From a bundle's master graph to the graph that TensorRT's parser is given, as small passes over onnx-ir.

Inputs, outputs and weights stay those of the master; only the attention op and the size of the cache change. What no pass here can
make right, `preflight.py` refuses.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from numpy.typing import NDArray
from onnx_ir.passes import common as common_passes

from headfold.export.graph.bodies import block_sums, call_plugin, inline_standard_body, rounds_inputs
from headfold.export.graph.experts import experts_nodes
from headfold.export.graph.joining import unpack_inputs
from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.recipes import recipe_of, remove_unread, replace_node
from headfold.export.model.storing import SCALES
from headfold.plugins.attention.schema import DOMAIN, OP_TYPE, Attention, AttentionInputs
from headfold.plugins.names import HIDDEN_STATES, is_cache_input, is_cache_output
from headfold.plugins.quantized.schema import FLOAT8, GATHER, GATHER_INPUTS, MATMUL, MATMUL_INPUTS, ROUNDED_INPUTS
from headfold.runtime.errors import BuildError, BundleError

_INPUTS = {MATMUL: MATMUL_INPUTS, GATHER: GATHER_INPUTS, FLOAT8: ROUNDED_INPUTS}  # of ops with matrices of few bits
_MESSAGE = 2_000_000_000  # bytes of weights; protobuf stops at 2^31
_ELSEWHERE = "The bundle runs in ONNX Runtime."


def lower(path: Path, attention: Attention, capacity: int) -> ir.Model:
    """The master graph at `path`, lowered; its weights stay in the master's data file. See `lower_model`."""
    return lower_model(ir.load(path), path, attention, capacity)


def lower_model(model: ir.Model, path: Path, attention: Attention, capacity: int) -> ir.Model:
    """A master graph, changed in place and returned, lowered for TensorRT.

    Args:
        model: the graph.
        path: where it is from, for messages.
        attention: `native` for TensorRT's own KV-cache, rotary and attention layers, `plugin` for one plugin per layer.
        capacity: C of the caches, which TensorRT wants static.

    Raises:
        BundleError: the graph is not one that headfold exported.
        BuildError: it has what headfold has in TensorRT in neither way.
    """
    nodes = attention_nodes(model)
    if not nodes:
        raise BundleError(f"has no {DOMAIN}::{OP_TYPE} node", where=path, fix="Export the bundle again.")
    sinks = any(AttentionInputs.of_node(node.inputs).head_sink is not None for node in nodes)
    for present, what in (
        (sinks, "attention sinks"),
        (bool(experts_nodes(model)), "a mixture of experts"),
        (rounds_inputs(model), "products with rounded inputs (--weights w8a8)"),
    ):
        if present:
            raise BuildError(f"the model has {what}, which headfold has not in TensorRT", where=path, fix=_ELSEWHERE)
    unpack_inputs(model)
    drop_hidden_states(model)
    fix_capacity(model, capacity)
    spell_out_quantized(model, path)
    if attention == "native":
        inline_standard_body(model)
    else:
        call_plugin(model)
    spell_out_argmax(model)
    share_dimensions(model)
    onnxscript.optimizer.fold_constants(model)
    ir.passes.Sequential(
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=1),
        common_passes.DeduplicateInitializersPass(size_limit=64),  # bytes: shapes and window limits, never weights
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.IdentityEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedOpsetsPass(),
    )(model)
    return model


def drop_hidden_states(model: ir.Model) -> None:
    """An engine gives logits and caches only."""
    for output in [value for value in model.graph.outputs if value.name == HIDDEN_STATES]:
        model.graph.outputs.remove(output)


def fix_capacity(model: ir.Model, capacity: int) -> None:
    """Give every cache this many positions: [batch, Hkv, capacity, D]."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if is_cache_input(value.name) or is_cache_output(value.name):
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:2], capacity, *value.shape[3:]])


def spell_out_quantized(model: ir.Model, where: Path) -> None:
    """Matrices of four and eight bits become `DequantizeLinear`, which TensorRT fuses into their products; signed or floats, [N, K].

    So the engine keeps them as small as they are. The embedding, too: TensorRT looks rows up in quantized constants in no other way.
    It has no zero points: what they take off the numbers of a block is taken off its product with the sum of the input's block. Nor
    has it negative scales for eight bits.

    Raises:
        BuildError: they are more than the parser takes in one message.
    """
    _widen_scales(model)
    found = dict[str, tuple[ir.Value, ...]]()  # of each matrix the constants that the parser is given
    for node in list(model.graph):
        names = _INPUTS.get(node.op_type) if node.domain == DOMAIN else None
        if names is None:
            continue
        inputs = dict(zip(names, node.inputs, strict=False))
        values, scales, zeros = inputs["values"], inputs["scales"], inputs.get("zeros")
        assert values is not None
        assert values.name is not None
        assert values.shape is not None
        assert scales is not None
        bits = node.attributes.get_int("bits", 8)
        block = int(values.shape[-1]) * 8 // bits  # type: ignore[arg-type]  # of a weight: a number
        taken = _taken(zeros, scales, bits) if zeros is not None else None
        if values.name not in found:
            found[values.name] = _constants(node, values, scales, bits, where)
            for value in found[values.name]:
                if value is not values:
                    model.graph.register_initializer(value)
        numbers, *float8 = found[values.name]
        tape = ir.tape.Tape()
        steps = tape.op("DequantizeLinear", float8) if float8 else scales
        blocks = {"axis": 0} if node.op_type == FLOAT8 else {"axis": 1, "block_size": block}
        w = tape.op("DequantizeLinear", [numbers, steps], blocks)
        if node.op_type == GATHER:
            result = tape.op("Gather", [w, inputs["indices"]], {"axis": 0})
        else:
            x = inputs["x"]
            result = tape.op("MatMul", [x, tape.op("Transpose", [w], {"perm": [1, 0]})])
            if taken is not None:
                assert x is not None
                model.graph.register_initializer(taken)
                result = tape.op("Sub", [result, tape.op("MatMul", [block_sums(model, tape, x, block), taken])])
        replace_node(model, node, tape, result)
        remove_unread(model, [values, scales, zeros])
    for name in [name for name in model.functions if name[0] == DOMAIN and name[1] in _INPUTS]:
        del model.functions[name]
    size = sum(x.const_value.nbytes for values in found.values() for x in values if x.const_value is not None)
    if size > _MESSAGE:
        raise BuildError(
            f"{size:,} bytes of rounded weights are too many for TensorRT's parser", where=where, fix=_ELSEWHERE
        )


def _constants(node: ir.Node, values: ir.Value, scales: ir.Value, bits: int, where: Path) -> tuple[ir.Value, ...]:
    """A matrix's numbers as TensorRT has them; of float4 its scales, too."""
    if node.op_type == FLOAT8:
        return (values,)
    recipe = recipe_of(values)
    if recipe is not None and recipe.sources[0].endswith(".float4"):
        return _float4(values, scales, where)
    if bits == 8 and (_array(scales) < 0).any():
        _turn_signs(values, scales, where)
    return (_signed(values, bits),)


def _widen_scales(model: ir.Model) -> None:
    """Scales that the graph casts are stored as it casts them."""
    for node in [node for node in model.graph if node.op_type == "Cast" and not node.domain]:
        stored, cast = node.inputs[0], node.outputs[0]
        recipe = recipe_of(stored) if stored is not None else None
        if stored is not None and stored.const_value is not None and recipe and recipe.sources[0].endswith(SCALES):
            assert cast.dtype is not None
            stored.const_value = ir.tensor(stored.const_value.numpy().astype(cast.dtype.numpy()), name=stored.name)
            stored.dtype = cast.dtype
            ir.convenience.replace_all_uses_with(cast, stored)
            model.graph.remove(node, safe=True)


def _turn_signs(values: ir.Value, scales: ir.Value, where: Path) -> None:
    """Where a scale is negative, it and the numbers of its block get the other sign: the same weights.

    Raises:
        BuildError: such a block has the least number, which has no other sign.
    """
    numbers, steps = _array(values).astype(np.int16) - 128, _array(scales)
    turned = np.where(steps[..., None] < 0, -numbers, numbers)
    if turned.max() > 127:
        raise BuildError(f"{values.name} has scales that TensorRT refuses, negative ones", where=where, fix=_ELSEWHERE)
    values.const_value = ir.tensor((turned + 128).astype(np.uint8), name=values.name)
    scales.const_value = ir.tensor(np.abs(steps), name=scales.name)


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _signed(values: ir.Value, bits: int) -> ir.Value:
    """A matrix's numbers as int4 or int8 [N, K]: half of the range less, which is the highest bit of each turned."""
    stored, turned = values.const_value, 0x80 if bits == 8 else 0x88
    assert stored is not None
    rows, blocks, size = stored.shape.numpy()
    dtype, shape = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4, ir.Shape([rows, blocks * size * 8 // bits])
    name = f"{values.name}.signed"

    def read() -> ir.TensorProtocol:
        numbers = stored.numpy() ^ np.uint8(turned)
        if bits == 8:
            return ir.Tensor(numbers.view(np.int8).reshape(rows, -1), dtype, shape=shape, name=name)
        return ir.PackedTensor(numbers.ravel(), dtype, shape=shape, name=name)

    content = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=content)


def _float4(values: ir.Value, scales: ir.Value, where: Path) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A matrix of float4, which the graph has doubled in bytes: as such, [N, K]; its blocks' scales in float8, [N, G]; and what these
    are times, a power of two, as the scales.

    Raises:
        BuildError: these are too far apart, or not of headfold's making.
    """
    steps = _array(scales)
    doubled = 2 * steps.astype(np.float32)
    unit = np.exp2(np.ceil(np.log2(doubled.max() / 448)))  # the largest float8
    float8 = (doubled / unit).astype(ml_dtypes.float8_e4m3fn)
    if (float8.astype(np.float32) * unit != doubled).any():
        raise BuildError(f"{scales.name} holds scales that no float8 holds", where=where, fix=_ELSEWHERE)
    half = (_array(values).astype(np.float32) - 128) / 2  # [N, G, 16]
    codes = half.astype(ml_dtypes.float4_e2m1fn)
    if (codes.astype(np.float32) != half).any():
        raise BuildError(f"{values.name} holds numbers that no float4 is", where=where, fix=_ELSEWHERE)
    pairs, shape = codes.view(np.uint8).reshape(-1, 2), ir.Shape([len(half), half[0].size])
    numbers = ir.PackedTensor(pairs[:, 0] | pairs[:, 1] << 4, ir.DataType.FLOAT4E2M1, shape=shape)
    return (
        _initializer(f"{values.name}.packed", numbers),
        _initializer(f"{scales.name}.float8", ir.tensor(float8)),
        _initializer(f"{scales.name}.unit", ir.tensor(unit.astype(steps.dtype))),
    )


def _initializer(name: str, content: ir.TensorProtocol) -> ir.Value:
    content.name = name
    shape = ir.Shape(content.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(content.dtype), const_value=content)


def _taken(zeros: ir.Value, scales: ir.Value, bits: int) -> ir.Value:
    """What zero points take off, of a number in each block: zero point, half of the range less, times scale; as the scales, [G, N]."""
    assert scales.shape is not None
    rows, blocks = (int(dim) for dim in scales.shape)  # type: ignore[arg-type]  # of a weight: numbers
    stored, steps = _array(zeros), _array(scales)  # before signs are turned
    numbers = stored if bits == 8 else np.stack((stored & 15, stored >> 4), -1).reshape(rows, -1)
    signed = numbers[:, :blocks].astype(np.float32) - (1 << (bits - 1))
    return _initializer(f"{zeros.name}.taken", ir.tensor(np.ascontiguousarray((signed * steps).astype(steps.dtype).T)))


def spell_out_argmax(model: ir.Model) -> None:
    """`ArgMax` becomes the smallest index that holds the maximum.

    TensorRT makes it a TopK, which does not say which of equal elements it finds; and the layout of a padded batch is read off a mask
    of zeros and ones.
    """
    for node in list(model.graph):
        if node.op_type != "ArgMax" or node.domain or node.attributes.get_int("select_last_index", 0) != 0:
            continue
        x, axis, keepdims = node.inputs[0], node.attributes.get_int("axis", 0), node.attributes.get_int("keepdims", 1)
        assert x is not None
        if axis != len(x.shape or ()) - 1:
            continue  # the range of indices below is made for the last axis; preflight refuses what is left
        tape = ir.tape.Tape()
        along = tape.initializer(ir.tensor([axis]), name=f"{node.name}.axis")
        zero = tape.initializer(ir.tensor(0), name=f"{node.name}.zero")
        one = tape.initializer(ir.tensor(1), name=f"{node.name}.one")
        size = tape.op("Squeeze", [tape.op("Shape", [x], {"start": axis, "end": axis + 1})])
        largest = tape.op("ReduceMax", [x, along], {"keepdims": 1})
        indices = tape.op("Where", [tape.op("Equal", [x, largest]), tape.op("Range", [zero, size, one]), size])
        first = tape.op("ReduceMin", [indices, along], {"keepdims": keepdims})
        for initializer in tape.initializers:
            model.graph.register_initializer(initializer)
        replace_node(model, node, tape, first)


def share_dimensions(model: ir.Model) -> None:
    """Read a dynamic dimension off the graph's inputs wherever it is read off something else.

    Each layer's body asks its own query for the number of new tokens. Once all of them ask `input_ids`, positions and masks are
    the same expressions in all layers, and one is enough.
    """
    sources: dict[str, tuple[ir.Value, int]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                sources.setdefault(str(dim.value), (value, axis))
    for node in model.graph:
        start, end = node.attributes.get("start"), node.attributes.get("end")
        if node.op_type != "Shape" or node.domain or start is None or end is None:
            continue
        read, axis = node.inputs[0], start.as_int()
        if read is None or read.shape is None or end.as_int() != axis + 1 or axis < 0:
            continue
        dim = read.shape[axis]
        if not isinstance(dim, ir.SymbolicDim) or (source := sources.get(str(dim.value))) is None or source[0] is read:
            continue
        node.replace_input_with(0, source[0])
        node.attributes["start"] = ir.AttrInt64("start", source[1])
        node.attributes["end"] = ir.AttrInt64("end", source[1] + 1)
