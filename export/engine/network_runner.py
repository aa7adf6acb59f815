"""Executes a TensorRT network as parsed, on the CPU: what the engine would compute, before there is a GPU to run it on.

Walks INetworkDefinition layer by layer with `network_layers.py`, and holds it to its word: dtypes, static dimensions, aliased memory.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from headfold.export.engine.build import lowered_network
from headfold.export.engine.network_layers import run_layer, torch_dtype, unknown
from headfold.export.engine.network_report import ParsedNetwork, kind, open_flavour, report
from headfold.export.engine.options import BuildOptions, check_cache
from headfold.export.parity.compare import Candidate
from headfold.export.parity.runners import CachedRunner
from headfold.export.parity.verify import precision_of
from headfold.plugins.names import hidden_state, input_of, is_cache_input, is_cache_output
from headfold.runtime.errors import VerificationError
from headfold.runtime.manifest import Manifest

# What torch has not, as what it has
_AS: dict[ir.DataType | None, Any] = {ir.DataType.INT4: np.int8, ir.DataType.FLOAT4E2M1: np.float32}
_IN_PLACE = {"KV_CACHE_UPDATE", "PLUGIN_V3"}


@dataclass(frozen=True)
class _Step:
    """One layer, and the names of its tensors; None for an input it does without."""

    kind: str
    layer: Any
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]  # tensors nobody needs after it


class Network:
    """A parsed network that can be called.

    Args:
        parsed: the network.
        model: the graph it was parsed from: TensorRT's Python cannot show bfloat16 and int4 weights, so they are read there, by name.
        keep: names of tensors to return besides the outputs.
    """

    def __init__(self, parsed: ParsedNetwork, model: ir.Model, keep: tuple[str, ...] = ()) -> None:
        self.parsed, network = parsed, parsed.network
        self.inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)] + list(keep)
        self._wide: dict[str, Tensor] = {}  # float32 copies of the weights, which matrix products want
        self._constants: dict[str, Tensor] = {}
        layers = self._in_order(parsed.layers())
        pending = []
        for layer in layers:
            name = kind(layer)
            inputs = tuple(t.name if t is not None else None for t in map(layer.get_input, range(layer.num_inputs)))
            outputs = tuple(layer.get_output(i).name for i in range(layer.num_outputs))
            if name == "CONSTANT":
                self._constants[outputs[0]] = _constant(layer, model)
            elif inputs and all(tensor in self._constants for tensor in inputs):  # folded once
                values = [self._constants[tensor] for tensor in inputs if tensor is not None]
                self._constants.update(zip(outputs, run_layer(name, layer, values), strict=True))
            else:
                pending.append((name, layer, inputs, outputs))
        self._refuse_late_readers(pending)
        self._steps = self._with_lifetimes(pending)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it. Caches among `feeds` are updated in place where the network says so, and returned as they are.

        Raises:
            VerificationError: an input, or what a layer made, is not what the network declares; or the layer is unknown.
        """
        values: dict[str, Tensor] = {}
        for name, tensor in self.inputs.items():
            _check(f"input {name!r}", tensor, feeds[name])
            values[name] = feeds[name]
        for step in self._steps:
            inputs = [self._value(step, name, values) for name in step.inputs]
            results = run_layer(step.kind, step.layer, inputs)
            for i, (name, result) in enumerate(zip(step.outputs, results, strict=True)):
                _check(f"layer {step.layer.name!r}", step.layer.get_output(i), result)
                values[name] = result
            for name in step.done:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _value(self, step: _Step, name: str | None, values: dict[str, Tensor]) -> Tensor | None:
        if name is None:
            return None
        if name not in self._constants:
            return values[name]
        if step.kind != "MATRIX_MULTIPLY":
            return self._constants[name]
        if name not in self._wide:
            self._wide[name] = self._constants[name].float()
        return self._wide[name]

    def _in_order(self, layers: list[Any]) -> list[Any]:
        """Layers after all they read: the parser's order is not always that."""
        ready, ordered, waiting = set(self.inputs), [], layers
        while waiting:
            later = []
            for layer in waiting:
                needed = (layer.get_input(i) for i in range(layer.num_inputs))
                if all(tensor is None or tensor.name in ready for tensor in needed):
                    ordered.append(layer)
                    ready.update(layer.get_output(i).name for i in range(layer.num_outputs))
                else:
                    later.append(layer)
            if len(later) == len(waiting):
                raise VerificationError(f"layer {later[0].name!r} reads a tensor that nothing makes")
            waiting = later
        return ordered

    def _refuse_late_readers(self, pending: list[tuple[str, Any, tuple[str | None, ...], tuple[str, ...]]]) -> None:
        """A cache that is updated in place has one reader, the update: with another, the order would decide the result."""
        readers: dict[str, list[Any]] = {}
        for _, layer, inputs, _ in pending:
            for name in inputs:
                if name in self.inputs and name is not None and is_cache_input(name):
                    readers.setdefault(name, []).append(layer)
        for name, layers in readers.items():
            if len(layers) > 1 and any(kind(layer) in _IN_PLACE for layer in layers):
                raise VerificationError(
                    f"{name} is updated in place, and read by {', '.join(repr(layer.name) for layer in layers)}",
                    fix="Each cache must go into one layer only.",
                )

    def _with_lifetimes(self, pending: list[tuple[str, Any, tuple[str | None, ...], tuple[str, ...]]]) -> list[_Step]:
        last: dict[str, int] = {}
        for index, (_, _, inputs, outputs) in enumerate(pending):
            last.update(
                (name, index) for name in (*inputs, *outputs) if name is not None and name not in self._constants
            )
        done: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self.outputs:
                done.setdefault(index, []).append(name)
        return [_Step(*parts, done=tuple(done.get(index, ()))) for index, parts in enumerate(pending)]


def _constant(layer: Any, model: ir.Model) -> Tensor:
    weights, shape = layer.weights, tuple(layer.shape)
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(weights.copy()).reshape(shape).to(torch_dtype(layer.get_output(0).dtype))
    value = model.graph.initializers.get(layer.name)
    if value is None or value.const_value is None or value.const_value.size != weights.size:
        raise unknown(layer, "is a constant without a name in the graph")
    if value.dtype in _AS:
        return torch.from_numpy(value.const_value.numpy().astype(_AS[value.dtype])).reshape(shape)
    dtype = torch_dtype(layer.get_output(0).dtype)
    size = np.uint8 if value.dtype == ir.DataType.FLOAT8E4M3FN else np.int16
    bits = np.ascontiguousarray(value.const_value.numpy()).view(size)
    return torch.from_numpy(bits.copy()).view(dtype).reshape(shape)


def _check(what: str, tensor: Any, value: Tensor) -> None:
    """Hold a value to the dtype and the static dimensions that the network declares."""
    declared, shape = torch_dtype(tensor.dtype), tuple(tensor.shape)
    fits = len(shape) == value.ndim and all(a in (-1, b) for a, b in zip(shape, value.shape, strict=False))
    if value.dtype != declared or not fits:
        raise VerificationError(
            f"{what} gave {value.dtype} {tuple(value.shape)} where the network declares {tensor.dtype} {shape}"
        )


def network_candidate(bundle: Path, manifest: Manifest, options: BuildOptions) -> Candidate:
    """The network that an engine with these options would be built from."""
    layers = manifest.cache.num_hidden_layers
    if manifest.cache.quantization is not None:
        check_cache(options, manifest.cache_dtype)
    trt = open_flavour(options.target)

    def start(capacity: int) -> CachedRunner:
        del capacity  # the engine's own
        names = tuple(map(hidden_state, range(layers)))

        def load() -> Network:
            model, parsed = lowered_network(trt, bundle, manifest, options)
            report(parsed, options.attention, layers)
            return Network(parsed, model, names)

        return NetworkRunner(load)

    return Candidate(
        start,
        replace(precision_of(manifest), engine="tensorrt"),
        f"the TensorRT network, {options.attention} attention",
    )


class NetworkRunner(CachedRunner):
    """A polygraphy runner around `Network`; see `headfold.export.parity.runners` for feeds and outputs."""

    def __init__(self, load: Callable[[], Network]) -> None:
        super().__init__("tensorrt-network")
        self._load = load

    def activate_impl(self) -> None:
        """Parse."""
        self._network: Network | None = self._load()

    def deactivate_impl(self) -> None:
        """Free TensorRT's objects and the weights."""
        self._network = None
        self._caches: dict[str, Tensor] = {}

    def start(self, batch: int) -> None:
        """Empty caches."""
        assert self._network is not None
        self._caches = {
            name: torch.zeros((batch, *list(tensor.shape)[1:]), dtype=torch_dtype(tensor.dtype))
            for name, tensor in self._network.inputs.items()
            if is_cache_input(name)
        }

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> "OrderedDict[str, NDArray[Any]]":
        """One call of the network. The caches are those of `start`, or what the network returned instead."""
        assert self._network is not None
        feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)} | self._caches
        results = self._network(feeds)
        outputs: OrderedDict[str, NDArray[Any]] = OrderedDict()
        for name, value in results.items():
            if is_cache_output(name):
                past = input_of(name)
                if value.data_ptr() != self._caches[past].data_ptr():
                    raise VerificationError(
                        f"{name} is not the memory of {past}", fix="The engine's caches are updated in place."
                    )
                value = value[:, :, : mask.shape[1]]
            outputs[name] = value.float().numpy()
        return outputs
