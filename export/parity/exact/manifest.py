"""What a bundle's manifest says, by which people choose and runtimes open it, held to its graph, its model and its report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from headfold.plugins.dtypes import DTYPES
from headfold.runtime.errors import BundleError
from headfold.runtime.files.graph_check import check_graph
from headfold.runtime.files.json_file import MANIFEST_BYTES, read_object
from headfold.runtime.manifest import MANIFEST, MODEL, PARITY, Manifest, TensorSpec

_AGAIN = "Export the bundle again."


@dataclass(frozen=True)
class _Port:
    name: str
    type: str
    shape: Sequence[Any]


def tensor_spec(value: ir.Value) -> TensorSpec:
    """An input or output of a graph, as a manifest has it."""
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def check_against_graph(bundle: Path, manifest: Manifest, model: ir.Model) -> None:
    """Raises BundleError: the manifest says something else of inputs and outputs than the graph, or than the report of its proof."""
    ports = list[list[_Port]]()
    for kind, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs)):
        specs = [tensor_spec(value) for value in values]
        ports.append([_Port(spec.name, _type(spec.dtype), spec.shape) for spec in specs])
        if wrong := [spec.name for spec, said in zip(specs, getattr(manifest, kind), strict=False) if spec != said]:
            what = f"its {wrong[0]} is not the manifest's"
            raise BundleError(what, where=bundle / MODEL, fix=_AGAIN)
    inputs, outputs = ports
    check_graph(inputs, outputs, bundle / MODEL, manifest)
    if manifest.parity is None:
        return
    said = {"passed": manifest.parity.get("passed")} | report_of_weights(manifest)
    report = read_object(bundle / PARITY, MANIFEST_BYTES, BundleError, _AGAIN)
    for name, value in {**said, "passed": True}.items():
        if report.get(name) != value or said[name] != value:
            raise BundleError(f"{PARITY} and {MANIFEST} differ in {name!r}", where=bundle, fix=_AGAIN)


def report_of_weights(manifest: Manifest) -> dict[str, Any]:
    """What rounded weights cost, in `parity.json` beside its comparisons, which are with the rounded ones."""
    return {"weights": manifest.weights.model_dump()} if manifest.weights is not None else {}


def check_parameters(bundle: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BundleError: the manifest has another number of them than the model's tensors, which have these shapes."""
    count = sum(map(math.prod, shapes.values()))
    if manifest.parameters != count:
        what = f"says {manifest.parameters:,} parameters, and the model has {count:,}"
        raise BundleError(what, where=bundle / MANIFEST, fix=_AGAIN)


def _type(dtype: str) -> str:
    return f"tensor({DTYPES[dtype].onnxruntime if dtype in DTYPES else dtype})"
