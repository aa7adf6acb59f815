"""The first part of the proof: what the file says is what the checkpoint says, exactly. Read tensor by tensor; no second copy is made.

Every initializer is a weight, bit for bit what its recipe makes of the checkpoint; a rotary table; a cache's scale; or small.
Every tensor of the checkpoint is in one of them, and each of them is read by the graph. A recipe is the file's own word: that the right
weight stands in the right place is for the arithmetic to show, each layer alone.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from headfold.export.exportables.base import Tensors
from headfold.export.exportables.facts import Facts, LayerFacts
from headfold.export.exportables.oracle import Oracle, QuantizedCache
from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.recipes import recipe_of
from headfold.export.graph.weights import let_go
from headfold.export.model.config import ModelConfig
from headfold.export.parity.exact.rotary import tables
from headfold.export.parity.report import CheckResult, verdict
from headfold.plugins.attention.schema import NORMS, SCALES, SINK, TABLES, AttentionInputs, Attributes
from headfold.plugins.dtypes import QUANTIZED, Quantized
from headfold.plugins.names import PARTS, cache_input, cache_output, scale_name
from headfold.runtime.errors import CheckpointError

_CONSTANT = 16  # elements at most of what is no weight: shapes, axes, scalars
_SCALE_ERROR = {
    "float32": 1e-3,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}  # a maximum of keys that were computed with rounded weights


def prove_weights(
    model: ir.Model, tensors: Tensors, dtype: torch.dtype, tables: Collection[str], scales: Collection[str]
) -> CheckResult:
    """Every initializer is explained, and every tensor is in the file, cast and otherwise untouched.

    `tables` and `scales` are names of initializers that are proven apart.
    """
    faults = list(_large_attributes(model))
    taken: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if not value.uses() and not value.is_graph_output():
            faults.append((name, "nothing reads it"))
        elif name not in tables and name not in scales:
            fault, sources = _weight(value, tensors, dtype)
            let_go(value)
            taken.update(sources)
            if fault is not None:
                faults.append((name, fault))
    faults += [(name, "the file does not have it") for name in tensors.shapes() if not taken[name]]
    return verdict("weights, bit for bit", faults)


def _weight(value: ir.Value, tensors: Tensors, dtype: torch.dtype) -> tuple[str | None, Sequence[str]]:
    """What is wrong with a weight or constant, and the tensors it is made of."""
    tensor = value.const_value
    if tensor is None:
        return "has no value", ()
    try:
        recipe = recipe_of(value)
    except ValueError:
        return "its recipe cannot be read", ()
    if recipe is None:
        small = tensor.size == 1 or (tensor.size <= _CONSTANT and not tensor.dtype.is_floating_point())
        return (None if small else "is nothing that the checkpoint has"), ()
    if recipe.name != value.name:
        return "its recipe is another's", ()
    try:
        exact = recipe.make(tensors.read)
    except KeyError:
        return "its recipe is of another model", ()
    except RuntimeError:
        return "its recipe joins what does not fit together", ()
    kind, actual = to_torch_dtype(tensor.dtype), tensor.numpy()
    expected = exact.to(kind)
    narrower = kind != dtype and kind in {torch.float16, torch.bfloat16}  # than it should be, unless nothing is lost
    if actual.shape != tuple(expected.shape) or (narrower and _loses(expected, exact)):
        return f"is {tensor.dtype} {list(actual.shape)}", recipe.sources
    different = int((_bits(expected) != actual.view(f"u{kind.itemsize}")).sum())
    return (f"{different:,} of {actual.size:,} numbers differ" if different else None), recipe.sources


def _loses(narrow: Tensor, exact: Tensor) -> bool:
    """Whether they differ as numbers; NaN is NaN, whose bits are compared elsewhere."""
    return not torch.allclose(narrow.float(), exact.float(), rtol=0, atol=0, equal_nan=True)


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    size = tensor.element_size()
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.contiguous().view(kind).numpy().view(f"u{size}")


def _large_attributes(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Tensors that hide in attributes of nodes, in the graph or a function."""
    for node in (*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())):
        for attribute in node.attributes.values():
            if (
                attribute.type == ir.AttributeType.TENSOR
                and not attribute.is_ref()
                and attribute.as_tensor().size > _CONSTANT
            ):
                yield f"{node.op_type} {node.name}", "has a tensor in an attribute"


def prove_tables(model: ir.Model, config: ModelConfig, capacity: int, dtype: torch.dtype) -> CheckResult:
    """Cosines and sines of every position, against the papers' formulas in float64; see `rotary.tables` for the limit."""
    half = torch.finfo(dtype).eps / 2
    worst, limit, at, passed, most = 0.0, 0.0, TABLES[0], True, -1.0
    found = {}
    for name in TABLES:
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            return verdict("rotary tables", [(name, "is missing")])
        if tuple(value.const_value.shape.numpy()) != (capacity, config.rotary_dim // 2):
            return verdict(
                "rotary tables", [(name, f"is {value.const_value.shape}, not [{capacity}, {config.rotary_dim // 2}]")]
            )
        found[name] = value.const_value.numpy()
    for begin, cos, sin, unsure in tables(config.rope, config.rotary_dim, capacity):
        for name, right in zip(TABLES, (cos, sin), strict=True):
            allowed = unsure + half * np.abs(right)
            with np.errstate(all="ignore"):  # what a damaged table holds may be anything
                errors = np.abs(found[name][begin : begin + len(right)].astype(np.float64) - right)
                shares = np.nan_to_num(errors / allowed, nan=np.inf)
            passed &= bool((errors <= allowed).all())  # NaN is not
            position = np.unravel_index(np.argmax(shares), errors.shape)
            if shares[position] > most:
                worst, limit, most = float(errors[position]), float(allowed[position]), float(shares[position])
                at = f"{name} at position {begin + int(position[0])}"
    return CheckResult("rotary tables, every position", worst, worst, limit, at, passed)


def table_names(model: ir.Model) -> set[str]:
    """The initializers that attention nodes take as rotary tables."""
    layers = [AttentionInputs[ir.Value | None].of_node(node.inputs) for node in attention_nodes(model)]
    return {value.name or "" for layer in layers for value in layer.tables or () if value is not None}


def prove_rotations(model: ir.Model, again: ir.Model) -> CheckResult:
    """What each layer rotates by, against a graph traced anew from the model: pairing and tables, bit for bit, at every position.

    While tracing, tables are held to the model's own rotation; see `headfold.export.graph.rotation`.
    """
    faults = list[tuple[str, str]]()
    for layer, pair in enumerate(zip(attention_nodes(model), attention_nodes(again), strict=False)):
        actual, expected = (_rotation(node) for node in pair)
        if actual[0] != expected[0]:
            faults.append((f"attention {layer}", f"rotary_interleaved is {actual[0]}, not {expected[0]}"))
        for name, found, right in zip(TABLES, actual[1], expected[1], strict=True):
            if (found is None) != (right is None) or (
                found is not None and right is not None and not np.array_equal(found.numpy(), right.numpy())
            ):
                faults.append((f"attention {layer}", f"{name} is not that of the model"))
    return verdict("rotary tables", faults)


def _rotation(node: ir.Node) -> tuple[int, list[ir.TensorProtocol | None]]:
    inputs = AttentionInputs[ir.Value | None].of_node(node.inputs)
    tensors = [None if value is None else value.const_value for value in (inputs.cos_cache, inputs.sin_cache)]
    return node.attributes.get_int("rotary_interleaved", 0), tensors


def prove_attributes(model: ir.Model, facts: Facts, own: ModelConfig | None) -> CheckResult:
    """Every attention node has the attributes, caches and sinks of its layer.

    Of one of our own decoders, `own`, also its tables and norms, and every norm the epsilon.
    """
    nodes, faults = attention_nodes(model), list[tuple[str, str]]()
    if len(nodes) != len(facts.layers):
        faults.append(("graph", f"has {len(nodes)} attention nodes for {len(facts.layers)} layers"))
    for layer, (node, right) in enumerate(zip(nodes, facts.layers, strict=False)):
        where, inputs = f"attention {layer}", AttentionInputs[ir.Value | None].of_node(node.inputs)
        for name, wanted in _attributes(right, own).items():
            attribute = node.attributes.get(name)
            actual = getattr(Attributes, name, math.nan) if attribute is None else attribute.value
            if np.float32(actual) != np.float32(wanted):
                faults.append((where, f"{name} is {actual}, not {wanted}"))
        names = {name: value.name for name, value in inputs.given().items() if value is not None}
        wanted_inputs = {f"past_{part}": cache_input(layer, part) for part in PARTS} | _own_inputs(own, layer)
        wanted_inputs |= {part: scale_name(layer, part) for part in SCALES if part in names}
        faults += [(where, f"{x} is {names.get(x)}") for x, name in wanted_inputs.items() if names.get(x) != name]
        if right.sinks != (SINK in names):
            faults.append((where, "has sinks" if SINK in names else "has no sinks"))
        for part, output in zip(PARTS, node.outputs[1:], strict=True):
            if output.name != cache_output(layer, part) or not output.is_graph_output():
                faults.append((where, f"its {part}s come out as {output.name}"))
    return verdict("attributes", faults + (list(_norms(model, own)) if own is not None else []))


def _attributes(layer: LayerFacts, own: ModelConfig | None) -> dict[str, float]:
    expected: dict[str, float] = {
        "num_heads": layer.num_attention_heads,
        "kv_num_heads": layer.num_key_value_heads,
        "scale": layer.scale,
        "local_window_size": layer.window,
        "softcap": layer.softcap,
    }
    return expected | ({"rotary_interleaved": 0, "qk_norm_epsilon": own.norm_eps} if own is not None else {})


def _own_inputs(own: ModelConfig | None, layer: int) -> dict[str, str]:
    if own is None:
        return {}
    norms = {name: f"model.layers.{layer}.self_attn.{name[0]}_norm.weight" for name in NORMS} if own.qk_norm else {}
    return {name: name for name in TABLES} | norms


def _norms(model: ir.Model, own: ModelConfig) -> Iterator[tuple[str, str]]:
    for node in model.graph:
        if node.op_type in {"RMSNormalization", "LayerNormalization"} and not node.domain:
            epsilon, axis = node.attributes.get_float("epsilon", 1e-5), node.attributes.get_int("axis", -1)
            if np.float32(epsilon) != np.float32(own.norm_eps) or axis != -1:
                yield f"{node.op_type} {node.name}", f"epsilon is {epsilon}, axis {axis}"


def prove_scales(oracle: Oracle, tokens: Tensor, stored: QuantizedCache, dtype: str) -> CheckResult:
    """A quantized cache's scales are the largest magnitudes that the oracle has on the calibration tokens [N, S]."""
    _, largest = QUANTIZED[stored.dtype]
    seen = []  # [2 L, Hkv] each
    for row in tokens.numpy():
        answer = oracle.answer(row)
        seen.append([np.abs(x).max((1, 2)) for pair in answer.cache for x in pair])
    right = np.maximum(np.max(seen, 0) / largest, 1e-8)
    actual = np.array([scale.numpy() for pair in stored.scales for scale in pair])
    errors, limit = np.abs(actual / right - 1), _SCALE_ERROR[dtype]
    layer = int(np.argmax(np.nan_to_num(errors, nan=np.inf).max(1))) // 2
    return CheckResult(
        "cache scales",
        float(errors.max()),
        float(errors.mean()),
        limit,
        f"of layer {layer}",
        bool((errors <= limit).all()),
    )


def stored_cache(model: ir.Model, dtype: Quantized, num_hidden_layers: int) -> QuantizedCache:
    """How the graph's quantized cache stores.

    Raises:
        CheckpointError: a scale is missing.
    """

    def read(layer: int, part: str) -> Tensor:
        value = model.graph.initializers.get(scale_name(layer, part))
        if value is None or value.const_value is None:
            raise CheckpointError(f"the quantized cache of layer {layer} has no {part}", fix="Export the bundle again.")
        return torch.tensor(value.const_value.numpy())

    return QuantizedCache(dtype, [(read(i, SCALES[0]), read(i, SCALES[1])) for i in range(num_hidden_layers)])
