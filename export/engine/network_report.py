"""A lowered graph in TensorRT's parser, and what became of it: which layer each attention is, and whether that was asked for.

A network keeps its builder, parser and logger alive: `ParsedNetwork` holds them together.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from headfold.plugins.attention import tensorrt_plugin
from headfold.plugins.attention.schema import Attention
from headfold.plugins.names import PARTS, cache_input, cache_output
from headfold.plugins.tensorrt_library import Flavour, TensorRTMissing, open_tensorrt
from headfold.runtime.errors import BuildError, HeadfoldError

NATIVE_LAYERS = (
    "KV_CACHE_UPDATE",
    "ROTARY_EMBEDDING",
    "ATTENTION",
)  # per attention: two, two (none without RoPE) and one
PLUGIN_LAYER = "PLUGIN_V3"


def open_flavour(flavour: Flavour) -> Any:
    """The TensorRT module of a flavour, with the plugin registered. Raises HeadfoldError if it is not installed."""
    try:
        trt = open_tensorrt(flavour)
    except TensorRTMissing as error:
        raise HeadfoldError(str(error), where=f"target {flavour}") from error
    if not tensorrt_plugin.registered(trt):
        tensorrt_plugin.register(trt, None)
    return trt


@dataclass(frozen=True)
class ParsedNetwork:
    """TensorRT's objects; they depend on each other."""

    trt: Any
    logger: Any
    builder: Any
    network: Any
    parser: Any

    def layers(self) -> list[Any]:
        """All layers in order, each as its own class."""
        return [typed(self.trt, self.network.get_layer(i)) for i in range(self.network.num_layers)]


@dataclass(frozen=True)
class AttentionLayers:
    """What the parser made of one attention op: how many layers of which kind, and the caches updated in place."""

    index: int
    layers: dict[str, int]
    aliased: dict[str, str]  # output of the network: the input whose memory it is

    def __str__(self) -> str:
        counts = ", ".join(f"{kind} x{number}" if number > 1 else kind for kind, number in self.layers.items())
        return f"layer {self.index}: {counts}; {len(self.aliased)} caches in place"


def parse(trt: Any, model: ir.Model, weights: Path) -> ParsedNetwork:
    """Give a lowered graph to TensorRT's parser.

    Args:
        trt: from `open_flavour`.
        model: from `headfold.export.engine.lowering.lower`.
        weights: the ONNX file beside which its weights lie.

    Raises:
        BuildError: the parser refuses it; names the node.
    """
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(ir.to_proto(model).SerializeToString(), str(weights.absolute())):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0].desc() if errors else logger.last_error()
        node = errors[0].node_name() if errors else ""
        raise BuildError(
            f"TensorRT's parser refuses node {node or '?'}: {first}", where=weights, fix="This is a bug of headfold."
        )
    return ParsedNetwork(trt, logger, builder, network, parser)


def collecting_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing, and keeps errors and warnings."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base is Any
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "no reason given"

    return Logger()


def kind(layer: Any) -> str:
    """A layer's kind by its name in trt.LayerType; an activation's own `type` is something else."""
    base = next(cls for cls in type(layer).__mro__ if cls.__name__ == "ILayer")
    return str(base.type.__get__(layer)).rpartition(".")[2]  # type: ignore[attr-defined]


def typed(trt: Any, layer: Any) -> Any:
    """The layer as its own class: TensorRT's Python hands out the base class. Unknown kinds stay what they are."""
    name = _CLASSES.get(kind(layer))
    if name is not None:
        layer.__class__ = getattr(trt, name)
    return layer


_CLASSES = {
    "ACTIVATION": "IActivationLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer",
    "ATTENTION_OUTPUT": "IAttentionOutputLayer",
    "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer",
    "CONSTANT": "IConstantLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "FILL": "IFillLayer",
    "GATHER": "IGatherLayer",
    "IDENTITY": "IIdentityLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "NORMALIZATION": "INormalizationLayer",
    "PLUGIN_V3": "IPluginV3Layer",
    "REDUCE": "IReduceLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
    "SELECT": "ISelectLayer",
    "SHAPE": "IShapeLayer",
    "SHUFFLE": "IShuffleLayer",
    "SLICE": "ISliceLayer",
    "SQUEEZE": "ISqueezeLayer",
    "TOPK": "ITopKLayer",
    "UNARY": "IUnaryLayer",
    "UNSQUEEZE": "IUnsqueezeLayer",
}


def aliases(parsed: ParsedNetwork) -> dict[str, str]:
    """Which outputs of layers are the memory of which tensors: the caches updated in place."""
    found = {}
    for layer in parsed.layers():
        if kind(layer) == "KV_CACHE_UPDATE":
            found[layer.get_output(0).name] = layer.get_input(0).name
        elif kind(layer) == PLUGIN_LAYER:
            for output in range(layer.num_outputs):
                source = layer.plugin.get_aliased_input(output)
                if source >= 0:
                    found[layer.get_output(output).name] = layer.get_input(source).name
    return found


def report(parsed: ParsedNetwork, attention: Attention, num_layers: int) -> list[AttentionLayers]:
    """What each attention became.

    Raises:
        BuildError: an attention is not the layers asked for, or a cache is not updated in place.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(num_layers)]
    inputs = {parsed.network.get_input(i).name for i in range(parsed.network.num_inputs)}
    index = -1
    last = {"native": "ATTENTION", "plugin": PLUGIN_LAYER}[
        attention
    ]  # of one attention, which the next one's come behind
    for layer in parsed.layers():
        name = {"ATTENTION_INPUT": "ATTENTION", "ATTENTION_OUTPUT": ""}.get(kind(layer), kind(layer))
        if name not in (*NATIVE_LAYERS, PLUGIN_LAYER):
            continue
        if index < num_layers - 1 and (index < 0 or counts[index][last]):
            index += 1
        counts[index][name] += 1
    in_place = aliases(parsed)
    result = []
    for i, count in enumerate(counts):
        wanted = {cache_output(i, part): cache_input(i, part) for part in PARTS}
        found = {output: source for output, source in in_place.items() if output in wanted}
        result.append(AttentionLayers(i, dict(count), found))
        if not _complete(count, attention):
            raise BuildError(
                f"attention {i} became {dict(count) or 'no layers of its own'}, not what --attention {attention} asks for",
                fix="Please report it: the parser changed what it imports.",
            )
        if found != wanted or not set(wanted.values()) <= inputs:
            raise BuildError(
                f"the caches of attention {i} are updated as {found}, not in place as {wanted}",
                fix="Export the bundle again.",
            )
    return result


def _complete(count: Counter[str], attention: Attention) -> bool:
    if attention == "plugin":
        return dict(count) == {PLUGIN_LAYER: 1}
    return [count[name] for name in (*NATIVE_LAYERS, PLUGIN_LAYER)] in ([2, 2, 1, 0], [2, 0, 1, 0])
