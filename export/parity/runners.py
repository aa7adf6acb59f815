"""Polygraphy runners for parity: PyTorch without any cache as the oracle, and the exported graph in ONNX Runtime with its cache.

A feed is `input_ids` [B, S] and `attention_mask` [B, T] over past and new tokens. T = S starts new sequences; otherwise the runner
goes on with the ones it has. Outputs are the logits, and keys and values of all real tokens; everything undefined is set to 0.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from headfold.export.exportables.base import Oracle
from headfold.export.graph.bodies import widen_float8_caches
from headfold.export.graph.passes import expose_hidden_states, widen_to_float32
from headfold.export.parity.tolerances import Precision
from headfold.plugins.dtypes import DTYPES, from_onnxruntime
from headfold.plugins.names import (
    PARTS,
    cache_output,
    hidden_state,
    input_of,
    is_cache_input,
    is_cache_output,
)
from headfold.runtime.errors import BundleError

Feed = dict[str, NDArray[np.int64]]
Outputs = OrderedDict[str, NDArray[Any]]
GREEDY = "greedy"  # output of the first feed: tokens each runner picks when left alone


def feed(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Feed:
    """The inputs of one iteration."""
    return {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": np.ascontiguousarray(mask, np.int64)}


def _metadata() -> TensorMetadata:
    metadata = TensorMetadata()
    for name in ("input_ids", "attention_mask"):
        metadata.add(name, dtype=DataType.INT64, shape=(-1, -1))
    return metadata


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """The oracle: every row alone, unpadded, the whole sequence anew in each iteration. So it knows nothing of caches or masks."""

    def __init__(self, load: Callable[[], Oracle], all_logits: bool, greedy_tokens: int) -> None:
        super().__init__(name="pytorch", prefix="torch")
        self._load, self._all, self._greedy_tokens = load, all_logits, greedy_tokens

    def activate_impl(self) -> None:
        """Load the weights."""
        self._oracle: Oracle | None = self._load()
        self._rows: list[list[int]] = []
        self._first = True

    def deactivate_impl(self) -> None:
        """Free the weights, so that ONNX Runtime can have the memory."""
        self._oracle = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See module."""
        return _metadata()

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Feed) -> Outputs:
        """See module; the first call also gives greedy tokens and the residual stream after each layer."""
        oracle = self._oracle
        assert oracle is not None
        ids, mask = feed_dict["input_ids"], feed_dict["attention_mask"]
        length = ids.shape[1]
        new = mask[:, -length:] == 1  # [B, S]
        if mask.shape[1] == length:
            self._rows = [[] for _ in ids]
        for row, tokens in enumerate(self._rows):
            tokens.extend(ids[row][new[row]].tolist())
        outputs: Outputs = OrderedDict()
        longest, batch = max(map(len, self._rows)), len(ids)
        results = [oracle.compute(torch.tensor(tokens), last_only=not self._all) for tokens in self._rows]
        logits = np.zeros((batch, length if self._all else 1, results[0].logits.shape[-1]), np.float32)
        present: Outputs = OrderedDict()
        for row, (tokens, result) in enumerate(zip(self._rows, results, strict=True)):
            if self._all:
                logits[row][new[row]] = result.logits[-int(new[row].sum()) :].float().numpy()
            else:
                logits[row] = result.logits.float().numpy()
            for i, pair in enumerate(result.caches):
                for part, value in zip(PARTS, pair, strict=True):
                    shape = (batch, value.shape[0], longest, value.shape[2])
                    whole = present.setdefault(cache_output(i, part), np.zeros(shape, np.float32))
                    whole[row, :, : len(tokens)] = value.float().numpy()
            if self._first:
                for i, hidden in enumerate(result.hidden_states):
                    outputs[hidden_state(i)] = hidden[None].float().numpy()
        outputs["logits"] = logits
        outputs.update(present)
        if self._first:
            outputs[GREEDY] = self._greedy(oracle, list(self._rows[0]))
            self._first = False
        self.inference_time = 0.0
        return outputs

    def _greedy(self, oracle: Oracle, tokens: list[int]) -> NDArray[np.int64]:
        start = len(tokens)
        for _ in range(self._greedy_tokens):
            tokens.append(int(oracle.compute(torch.tensor(tokens), last_only=True).logits[-1].argmax()))
        return np.array(tokens[start:])


class CachedRunner(BaseRunner):  # type: ignore[misc]
    """A compiled graph, which sees each token once: the rest is in its cache. What a backend has to offer is `start` and `step`."""

    def __init__(self, name: str, greedy_tokens: int) -> None:
        super().__init__(name=name, prefix=name)
        self._greedy_tokens, self._first = greedy_tokens, True

    def start(self, batch: int) -> None:
        """Empty the caches, and make room for `batch` rows."""
        raise NotImplementedError

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """Run the graph once; all its outputs, as arrays of numbers."""
        raise NotImplementedError

    def get_input_metadata_impl(self) -> TensorMetadata:
        """See module: the caches are the runner's own business."""
        return _metadata()

    def infer_impl(self, feed_dict: Feed) -> Outputs:
        """See module; the first call also gives greedy tokens, and whatever else the graph has as outputs."""
        outputs = self._step(feed_dict)
        if self._first and self._greedy_tokens:
            self._first = False
            outputs[GREEDY] = self._greedy(feed_dict["attention_mask"], outputs["logits"])
        self.inference_time = 0.0
        return outputs

    def _step(self, feed_dict: Feed) -> Outputs:
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
            elif name == "logits" and x.shape[1] == length:
                x = np.where((mask[:, -length:] == 1)[:, :, None], x.astype(np.float32), 0)
            outputs[name] = x.astype(np.float32)
        return outputs

    def _greedy(self, mask: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Decode on; the cache keeps what these tokens leave behind the sequence, where the next feed overwrites it."""
        tokens: list[int] = []
        while True:
            tokens.append(int(logits[0, -1].argmax()))
            if len(tokens) == self._greedy_tokens:
                return np.array(tokens)
            mask = np.concatenate([mask, [[1]]], axis=1)
            logits = self._step(feed(np.array([tokens[-1:]]), mask))["logits"]


class OrtRunner(CachedRunner):
    """The exported graph in ONNX Runtime."""

    def __init__(self, load: Callable[[], ort.InferenceSession], capacity: int, greedy_tokens: int) -> None:
        super().__init__("onnxruntime", greedy_tokens)
        self._runner = OnnxrtRunner(load)
        self._capacity = capacity
        self._past: Outputs = OrderedDict()

    def activate_impl(self) -> None:
        """Open the session."""
        self._runner.activate()

    def deactivate_impl(self) -> None:
        """Close it."""
        self._runner.deactivate()

    def start(self, batch: int) -> None:
        """See CachedRunner."""
        self._past = OrderedDict()
        for node in self._runner.sess.get_inputs():
            if is_cache_input(node.name):
                shape = (batch, node.shape[1], self._capacity, node.shape[3])
                self._past[node.name] = np.zeros(shape, DTYPES[from_onnxruntime(node.type)].numpy)

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """See CachedRunner."""
        raw: Outputs = self._runner.infer({"input_ids": ids, "attention_mask": mask, **self._past})
        self._past = OrderedDict((input_of(name), x) for name, x in raw.items() if is_cache_output(name))
        return raw


def open_session(path: Path, precision: Precision, expose: bool = False) -> ort.InferenceSession:
    """The graph at `path` in ONNX Runtime on the CPU: as it is, with the residual stream as outputs (`expose`), or widened.

    ONNX Runtime has no bfloat16 matrix product on CPUs, so a bfloat16 graph runs in float32, with exactly its weights; and no float8
    cache, so its numbers are kept in float32, and the standard body computes with them.

    Raises:
        BundleError: ONNX Runtime, or onnx, cannot load it.
    """
    try:
        return _open(path, precision, expose)
    except Exception as error:  # ONNX Runtime's have no other base
        raise BundleError(f"ONNX Runtime cannot load it: {error}", where=path, fix="Export it again.") from error


def _open(path: Path, precision: Precision, expose: bool) -> ort.InferenceSession:
    wide = [name for name in (precision.dtype, precision.cache) if name in {"bfloat16", "float8_e4m3fn"}]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if not wide and not expose:
        return ort.InferenceSession(path, options, providers=providers)
    model = ir.load(path)
    if expose:
        expose_hidden_states(model)
    if wide:
        if "float8_e4m3fn" in wide:
            widen_float8_caches(model)
        if "bfloat16" in wide:
            widen_to_float32(model)
        with tempfile.TemporaryDirectory() as directory:
            ir.save(model, Path(directory) / path.name, external_data=f"{path.name}.data")
            return ort.InferenceSession(Path(directory) / path.name, options, providers=providers)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
    )
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=providers)
