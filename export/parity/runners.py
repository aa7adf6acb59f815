"""Polygraphy runners for a compiled graph with its cache, and the sessions of ONNX Runtime that parity opens.

A feed is `input_ids` [B, S] and `attention_mask` [B, T] over past and new tokens. T = S starts new sequences; otherwise the runner
goes on with the ones it has. Outputs are the logits, and keys and values of all real tokens; everything undefined is set to 0.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from headfold.export.graph.bodies import round_no_inputs, widen_float8_caches
from headfold.export.graph.passes import split_layers, widen_to_float32
from headfold.export.graph.weights import data_file, load_model, open_parts
from headfold.export.parity.tolerances import Precision
from headfold.plugins.dtypes import DTYPES, from_onnxruntime
from headfold.plugins.names import HIDDEN_STATES, input_of, is_cache_input, is_cache_output
from headfold.runtime.errors import BundleError
from headfold.runtime.session import SILENT, silenced

# Bytes of weights; more are read where they lie in their file, not packed for speed, and made wide as they multiply
_MAPPED = 1 << 30
Outputs = OrderedDict[str, NDArray[Any]]
Pass = Callable[[ir.Model], object]


def feed_metadata() -> TensorMetadata:
    """What polygraphy may feed; see module: the caches are a runner's own business."""
    metadata = TensorMetadata()
    for name in ("input_ids", "attention_mask"):
        metadata.add(name, dtype=DataType.INT64, shape=(-1, -1))
    return metadata


class CachedRunner(BaseRunner):  # type: ignore[misc]
    """A compiled graph, which sees each token once: the rest is in its cache. What a backend has to offer is `start` and `step`."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, prefix=name)

    def start(self, batch: int) -> None:
        """Empty the caches, and make room for `batch` rows."""
        raise NotImplementedError

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """Run the graph once; all its outputs, as arrays of numbers."""
        raise NotImplementedError

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See there."""
        return feed_metadata()

    def infer_impl(self, feed_dict: Any) -> Outputs:
        """See module."""
        ids, mask = feed_dict["input_ids"], feed_dict["attention_mask"]
        batch, length = ids.shape
        if mask.shape[1] == length:
            self.start(batch)
        lengths = mask.sum(1)  # [B]
        real = np.arange(int(lengths.max())) < lengths[:, None]  # [B, longest]
        outputs: Outputs = OrderedDict()
        for name, x in self.step(ids, mask).items():
            if is_cache_output(name):
                x = np.where(real[:, None, :, None], x[:, :, : real.shape[1]].astype(np.float32), 0)
            elif name in ("logits", HIDDEN_STATES) and x.shape[1] == length:
                x = np.where((mask[:, -length:] == 1)[:, :, None], x.astype(np.float32), 0)
            outputs[name] = x.astype(np.float32)
        self.inference_time = 0.0
        return outputs


class OrtRunner(CachedRunner):
    """A graph in ONNX Runtime; each new batch has caches of `capacity` positions."""

    def __init__(self, load: Callable[[], ort.InferenceSession], capacity: int) -> None:
        super().__init__("onnxruntime")
        self._runner, self._capacity = OnnxrtRunner(load), capacity
        self._past: Outputs = OrderedDict()

    def activate_impl(self) -> None:
        """Open the session."""
        self._runner.activate()

    def deactivate_impl(self) -> None:
        """Close it."""
        self._runner.deactivate()

    def start(self, batch: int) -> None:
        """See CachedRunner."""
        inputs = [node for node in self._runner.sess.get_inputs() if is_cache_input(node.name)]
        self._past = OrderedDict(
            (node.name, np.zeros((batch, node.shape[1], self._capacity, node.shape[3]), _numpy(node)))
            for node in inputs
        )

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """See CachedRunner."""
        raw: Outputs = self._runner.infer({"input_ids": ids, "attention_mask": mask, **self._past})
        self._past = OrderedDict((input_of(name), x) for name, x in raw.items() if is_cache_output(name))
        return raw


def _numpy(node: Any) -> Any:
    return DTYPES[from_onnxruntime(node.type)].numpy


class LayersRunner(BaseRunner):  # type: ignore[misc]
    """Layers of a graph, each alone in ONNX Runtime. Feeds are all their inputs, caches included; in float32, as their outputs.

    Of caches, outputs are the new rows, [B, Hkv, S, D]. One after the other: the long caches of one layer are in memory at a time.
    """

    def __init__(self, load: Callable[[], Sequence[ort.InferenceSession]]) -> None:
        super().__init__(name="onnxruntime, layers", prefix="onnxruntime, layers")
        self._load, self._sessions = load, list[ort.InferenceSession]()

    def activate_impl(self) -> None:
        """Open the sessions."""
        self._sessions = list(self._load())

    def deactivate_impl(self) -> None:
        """Close them."""
        self._sessions = []

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See there."""
        metadata = TensorMetadata()
        for node in (node for session in self._sessions for node in session.get_inputs()):
            dtype = DataType.INT64 if _numpy(node) == "int64" else DataType.FLOAT32
            metadata.add(node.name, dtype=dtype, shape=[x if isinstance(x, int) else -1 for x in node.shape])
        return metadata

    def infer_impl(self, feed_dict: Any) -> Outputs:
        """Give the caches the dtype that they have in the graph."""
        ends, length = feed_dict["attention_mask"].sum(1), feed_dict["input_ids"].shape[1]
        outputs: Outputs = OrderedDict()
        for session in self._sessions:
            feeds = {x.name: feed_dict[x.name].astype(_numpy(x), copy=False) for x in session.get_inputs()}
            for node, x in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                if is_cache_output(node.name):
                    x = np.stack([row[:, end - length : end] for row, end in zip(x, ends, strict=True)])
                outputs[node.name] = x.astype(np.float32, copy=False)
        self.inference_time = 0.0
        return outputs


class Graph:
    """The graph at `path`, and what parity makes of it for ONNX Runtime on CPUs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, *passes: Pass) -> ort.InferenceSession:
        """A session with the graph as it is, or after some passes; its weights stay in the file beside it.

        Raises:
            BundleError: ONNX Runtime, or onnx, cannot load it.
        """
        with self._errors():
            model = load_model(self.path)
            exact = round_no_inputs(model, late=self._large)  # what rounding a product's inputs costs is for the gate
            if not passes and not exact and not self._large:
                return ort.InferenceSession(self.path, self._options(), providers=["CPUExecutionProvider"])
            for change in passes:
                change(model)
            proto = ir.to_proto(model).SerializeToString()
            return open_parts([proto], self.path, self._options(), fold=not self._large)[0]

    def open_layers(self) -> list[ort.InferenceSession]:
        """A session for each layer alone, and one for what comes behind the last; see `split_layers`.

        Raises:
            BundleError: ONNX Runtime, or onnx, cannot load it.
        """
        with self._errors():
            model, options = load_model(self.path), self._options()
            round_no_inputs(model, late=self._large)
            # A session would keep what one long cache takes
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            parts = (ir.to_proto(part).SerializeToString() for part in split_layers(model))
            return open_parts(parts, self.path, options, fold=not self._large)

    @property
    def _large(self) -> bool:
        data = data_file(self.path)
        return data.is_file() and data.stat().st_size > _MAPPED

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = SILENT  # what goes wrong is raised too
        if self._large:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # it would keep all that was ever wide
        return options

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever goes wrong inside the block is one BundleError, and ONNX Runtime prints nothing."""
        try:
            with silenced():
                yield
        except Exception as error:  # ONNX Runtime's have no other base
            raise BundleError(
                f"ONNX Runtime cannot load it: {error}", where=self.path, fix="Export it again."
            ) from error


@contextmanager
def prepared(path: Path, precision: Precision, widen: bool) -> Iterator[Graph]:
    """The graph as ONNX Runtime can run it on CPUs; if `widen`, in float32 arithmetic, with exactly its own weights. In a temporary
    file if need be.

    ONNX Runtime has no float8 cache on CPUs either: its numbers are kept in float32, and the standard body computes with them.
    """
    passes: list[Pass] = []
    if precision.cache == "float8_e4m3fn":
        passes.append(widen_float8_caches)
    if widen and precision.dtype != "float32":
        passes.append(widen_to_float32)
    if not passes:
        yield Graph(path)
        return
    model = load_model(path)
    for change in passes:
        change(model)
    with tempfile.TemporaryDirectory(prefix="headfold-") as directory:
        ir.save(model, Path(directory) / path.name, external_data=f"{path.name}.data")
        yield Graph(Path(directory) / path.name)
