"""What a checkpoint can become, and why not what it cannot, by the checks of the commands themselves. No weight is read.

The graph that TensorRT's preflight looks at is that of an outline, in float32 as `headfold export` makes it by default.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import onnx_ir as ir
import torch

from headfold.export.bundle.genai import genai_refusal, genai_type
from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.opening import open_own
from headfold.export.conversion.layers import possible_heads
from headfold.export.engine.lowering import lower_model
from headfold.export.engine.options import check_cache_shapes
from headfold.export.engine.preflight import preflight
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.outline import outline
from headfold.export.exportables.own import OwnModel
from headfold.export.graph.bodies import onnxruntime_can
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import attach_weights
from headfold.export.quantization.products import roundable
from headfold.export.quantization.rounding import widths_of
from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import HeadfoldError
from headfold.runtime.manifest import WeightsScheme

T = TypeVar("T")
_CAPACITY = 4096  # of the graph, at most: larger tables make no other one


@dataclass(frozen=True)
class Target:
    """Something that a checkpoint can become or go through, or cannot; `note` says how, or why not and what to do."""

    name: str
    possible: bool
    note: str


def targets_of(exportable: Exportable, base: Path | None = None) -> list[Target]:
    """All there are, in the order of the work; `base` is what `open_exportable` was told."""
    capacity = min(exportable.facts.capacity, _CAPACITY)
    small = outline(exportable)
    model, why = _tried(lambda: _graph(small, capacity))
    graphs = _graphs(exportable, model, why, capacity)
    return [*graphs, *_storage(exportable, small, model, why), *_changes(exportable, base)]


def _graphs(exportable: Exportable, model: ir.Model | None, why: str, capacity: int) -> Iterator[Target]:
    """What is made of the outline's graph; without one, why not."""
    if model is None:
        yield Target("onnxruntime", False, why)
    else:
        kernel = "its own attention kernel" if onnxruntime_can(model) else "attention of standard ops, which is slower"
        yield Target("onnxruntime", True, kernel)
    refusal = why or genai_refusal(exportable.facts)
    yield Target("onnxruntime-genai", refusal is None, refusal or f"as {genai_type(exportable.facts)}")
    for attention in get_args(Attention):
        lowered: object = None
        if model is not None:
            lowered, why = _tried(lambda a=attention, m=model: _lowered(exportable, m.clone(), a, capacity))  # type: ignore[misc]
        yield Target(f"tensorrt {attention}", lowered is not None, why or f"headfold build --attention {attention}")


def _graph(small: Exportable, capacity: int) -> ir.Model:
    tensors = small.tensors(torch.float32)
    model = export_graph(small, tensors, torch.float32, capacity)
    attach_weights(model, tensors, small.tables(torch.float32, capacity), allow_nan=True)
    return model


def _lowered(exportable: Exportable, model: ir.Model, attention: Attention, capacity: int) -> ir.Model:
    """As `build_engine` does."""
    check_cache_shapes(exportable.facts.cache_shapes, exportable.path)
    lowered = lower_model(model, exportable.path, attention, capacity)
    preflight(lowered, attention, exportable.path)
    return lowered


def _storage(exportable: Exportable, small: Exportable, model: ir.Model | None, why: str) -> Iterator[Target]:
    """In how many bits numbers can be stored."""
    cached, why_not = _tried(lambda: small.master(torch.float32, 1, False, "int8"))
    yield Target("--kv-cache", cached is not None, why_not or "int8, float8_e4m3fn")
    bits = None
    if model is not None:
        shapes, names = small.tensors(torch.float32).shapes(), roundable(model)
        bits, why = _tried(lambda: widths_of({name: shapes[name] for name in names}, "int8", (), exportable.path))
    yield Target("--weights", bits is not None, why or ", ".join(get_args(WeightsScheme)))


def _changes(exportable: Exportable, base: Path | None) -> Iterator[Target]:
    """What changes the model; these commands open it themselves, and know no base."""

    def opened() -> Checkpoint:
        own = isinstance(exportable, OwnModel) and base is None
        return exportable.checkpoint if own else open_own(exportable.path)  # type: ignore[attr-defined]

    checkpoint, why = _tried(opened)
    heads = ", ".join(map(str, possible_heads(checkpoint.config))) if checkpoint is not None else ""
    yield Target("convert", checkpoint is not None, why or f"--kv-heads {heads}")
    for name in ("uptrain", "sweep"):
        yield Target(name, checkpoint is not None, why or f"headfold {name}")


def _tried(make: Callable[[], T]) -> tuple[T | None, str]:
    """What is made, or why it is not, without where: that is the same for all."""
    try:
        return make(), ""
    except HeadfoldError as error:
        return None, f"{error.what}. {error.fix}" if error.fix else error.what
