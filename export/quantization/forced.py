"""What a bundle says of text it is given, in ONNX Runtime as it will run there: prompts row by row, then a token of each row at once.

Packed for the kernels, weights take as much memory again as their file: a large bundle's layers are opened one after the other.
Shapes: N sequences of S tokens, V the vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from headfold.export.graph.passes import split_layers
from headfold.export.graph.weights import data_file, load_model, open_parts
from headfold.plugins.dtypes import DTYPES
from headfold.plugins.names import PARTS, cache_input, cache_output, hidden_state, is_cache_input, layer_input
from headfold.runtime import load
from headfold.runtime.backend import Backend, widened
from headfold.runtime.cpu import physical_cores
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import MODEL, Manifest
from headfold.runtime.session import OrtCache, OrtSession
from headfold.runtime.weight_pages import give_back_mapped

LARGE = 1 << 30  # bytes of weights in memory; more run layer by layer
_Tokens = NDArray[np.int64]
_Array = NDArray[Any]


class Forced(Protocol):
    """See module."""

    def logits(self, tokens: _Tokens, prompt: int) -> Iterator[NDArray[np.float32]]:
        """Behind the first `prompt` of [N, S] tokens, and behind each one after them: [N, V] each."""
        ...


def open_forced(bundle: Path, manifest: Manifest, prefill: Path | None = None) -> Forced:
    """Open a bundle, finished or staged; or a finished one with another that reads its prompts, both in memory as a whole.

    Raises:
        BundleError: ONNX Runtime cannot load it, or one of two is altered.
        InputError: the other one is of another model.
    """
    if prefill is not None:
        return _Whole(load(bundle, prefill=prefill).backend)
    # Of float8 ONNX Runtime makes floats when it loads it
    times = 4 if manifest.weights is not None and manifest.weights.scheme == "fp8" else 1
    if times * data_file(bundle / MODEL).stat().st_size > LARGE:
        parts = _parts(bundle / MODEL)
        if parts is not None:
            return _Layers(bundle / MODEL, manifest, parts)
    return _Whole(OrtSession(bundle, manifest))


class _Whole:
    """All layers at once."""

    def __init__(self, session: Backend[OrtCache]) -> None:
        self._session = session

    def logits(self, tokens: _Tokens, prompt: int) -> Iterator[NDArray[np.float32]]:
        """See Forced."""
        (rows, length), session = tokens.shape, self._session
        everyone, cache = np.ones(rows, np.bool_), session.new_cache(rows, length)
        yield np.stack([session.prefill(cache, row, tokens[row, :prompt]) for row in range(rows)])
        for place in range(prompt, length):
            yield session.decode(cache, tokens[:, place], everyone).copy()


class _Layers:
    """One layer at a time, on streams that are kept between. The last part is the final norm and the head.

    Args:
        path: of the graph.
        manifest: its bundle's.
        parts: of the graph, serialized; their weights are in its file.
    """

    def __init__(self, path: Path, manifest: Manifest, parts: Sequence[bytes]) -> None:
        self._path, self._manifest, self._parts = path, manifest, parts
        self._dtype, self._stored = DTYPES[manifest.dtype], DTYPES[manifest.cache_dtype]
        self._shapes = list(manifest.cache.tensors.values())  # Hkv, D of each layer

    def logits(self, tokens: _Tokens, prompt: int) -> Iterator[NDArray[np.float32]]:
        """See Forced."""
        last = len(self._parts) - 1
        calls = [(slice(row, row + 1), slice(0, prompt)) for row in range(len(tokens))]
        calls += [(slice(0, len(tokens)), slice(place, place + 1)) for place in range(prompt, tokens.shape[1])]
        streams: list[_Array | None] = [None] * len(calls)
        for layer in range(last):
            session, (heads, size) = self._open(layer), self._shapes[layer]
            shape = len(tokens), heads, tokens.shape[1], size
            cache = {part: np.zeros(shape, self._stored.numpy) for part in PARTS}
            for number, (rows, places) in enumerate(calls):
                new = {part: x[rows] for part, x in cache.items()}
                feeds = self._feeds(session, layer, tokens[rows], places, streams[number])
                streams[number] = self._run(session, layer, feeds, new)
            del session
        head, prompts = self._open(last), list[_Array]()
        for (rows, places), stream in zip(calls, streams, strict=True):
            feeds = self._feeds(head, last, tokens[rows], places, stream)
            behind = widened(head.run(["logits"], feeds)[0][:, -1], self._manifest.dtype)  # [n, V]
            if places.start:
                yield behind
            elif len(prompts) == len(tokens) - 1:
                yield np.concatenate([*prompts, behind])
            else:
                prompts.append(behind)

    def _open(self, layer: int) -> ort.InferenceSession:
        """Raises BundleError: ONNX Runtime cannot load it."""
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = physical_cores(), 1
        try:
            (session,) = open_parts([self._parts[layer]], self._path, options)
        except Exception as error:  # its exceptions have no other base
            raise BundleError(
                f"ONNX Runtime cannot load layer {layer}: {error}", where=self._path, fix="Export it again."
            ) from error
        give_back_mapped(data_file(self._path))
        return session

    def _feeds(
        self, session: ort.InferenceSession, layer: int, tokens: _Tokens, places: slice, stream: _Array | None
    ) -> dict[str, _Array]:
        """What a part reads beside its cache; the tokens at these places are new, and come behind all before."""
        needed = {node.name for node in session.get_inputs()}
        given: dict[str, _Array] = {
            "input_ids": np.ascontiguousarray(tokens[:, places]),
            "attention_mask": np.ones((len(tokens), places.stop), np.int64),
        }
        if stream is not None:
            given[layer_input(layer)] = stream
        own = {cache_input(layer, part) for part in PARTS}
        for (name, _), (heads, size) in self._manifest.cache.tensors.items():
            if name in needed - own:  # for its shape
                given[name] = np.zeros((len(tokens), heads, tokens.shape[1], size), self._stored.numpy)
        return {name: x for name, x in given.items() if name in needed}

    def _run(
        self, session: ort.InferenceSession, layer: int, feeds: dict[str, _Array], cache: dict[str, _Array]
    ) -> _Array:
        """What a layer hands on, [n, s, hidden]; its cache is written to, as `OrtSession` has it."""
        binding = session.io_binding()
        for name, x in feeds.items():
            binding.bind_cpu_input(name, x)
        for part, x in cache.items():
            place = ("cpu", 0, self._stored.onnx, x.shape, x.ctypes.data)
            binding.bind_input(cache_input(layer, part), *place)
            binding.bind_output(cache_output(layer, part), *place)
        binding.bind_output(hidden_state(layer), "cpu")
        session.run_with_iobinding(binding)
        handed: _Array = binding.get_outputs()[-1].numpy()
        return handed


def _parts(path: Path) -> list[bytes] | None:
    """Each layer of a graph, and what comes behind the last, as graphs of their own; None if one reads more than the stream."""
    parts = split_layers(load_model(path))
    for layer, part in enumerate(parts):
        own = {"input_ids", "attention_mask", *(cache_input(layer, part) for part in PARTS)}
        own |= {layer_input(layer)} if layer else set()
        if any(value.name not in own and not _only_its_shape(value) for value in part.graph.inputs):
            return None
    return [ir.to_proto(part).SerializeToString() for part in parts]


def _only_its_shape(value: ir.Value) -> bool:
    """Whether a cache is read for its capacity alone."""
    return is_cache_input(value.name) and all(node.op_type == "Shape" for node in value.consumers())
