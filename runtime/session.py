"""An ONNX Runtime session over one preallocated KV cache, bound as past and present, so that no token copies it.

Prefill goes row by row (the attention kernel takes several new tokens only for one sequence), on views of the batch's cache;
decode takes one token of every row. `Backend` is what another backend has to offer to be used by `generate`.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from headfold.runtime.errors import BundleError, CapacityError, ProviderError
from headfold.runtime.manifest import MODEL, Manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CHUNK = 512  # tokens per prefill step: enough to keep matrix products efficient, few enough to bound their memory
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # TensorProto.DataType
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16: its bits


class Cache(Protocol):
    """The KV cache of one batch."""

    lengths: NDArray[np.int64]  # [B] tokens in each row
    capacity: int  # tokens a row can have


class Backend(Protocol):
    """What `generate` needs."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""
        ...

    def prefill(self, cache: Cache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append the tokens `ids` [S] to a row; logits [V] of the last, or [S, V] where the bundle has all."""
        ...

    def decode(self, cache: Cache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Append one token per row, `tokens` [B]; logits [B, V]. Rows that are not active do not grow, their logits are garbage."""
        ...


class OrtCache:
    """Per layer keys and values [B, Hkv, C, D] on the session's device, zeroed."""

    def __init__(self, manifest: Manifest, batch: int, capacity: int, device: str) -> None:
        spec = manifest.cache
        self.capacity, self.batch = capacity, batch
        self.lengths = np.zeros(batch, np.int64)
        self.shape = (batch, spec.num_key_value_heads, capacity, spec.head_dim)
        self.element_type = _ONNX_TYPES[manifest.dtype]
        zeros = np.zeros(self.shape, _STORED[manifest.dtype])  # pages are taken when they are first written
        self.row_bytes = zeros[0].nbytes
        self.values: dict[str, Any] = {}
        for layer in range(spec.num_hidden_layers):
            for part in ("key", "value"):
                array = zeros if device != "cpu" else np.zeros_like(zeros)
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, self.element_type)
                if device != "cpu":
                    value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
                self.values[f"{layer}.{part}"] = (value, array)  # the array owns the memory of a CPU value
        self.binding: Any = None  # of decode, made once


class OrtSession:
    """Runs a bundle's graph.

    Raises:
        ProviderError: the provider is unknown, not available, or cannot run this bundle.
        BundleError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, bundle: Path, manifest: Manifest, provider: str = "cpu", threads: int | None = None) -> None:
        if provider not in PROVIDERS:
            raise ProviderError(f"provider {provider!r} is unknown", fix=f"headfold knows {', '.join(PROVIDERS)}.")
        name = PROVIDERS[provider]
        if name not in ort.get_available_providers():
            raise ProviderError(
                f"this onnxruntime has no {name}",
                where=f"provider {provider!r}",
                fix="Install onnxruntime-gpu, or use provider 'cpu'.",
            )
        if manifest.dtype == "bfloat16" and provider == "cpu":
            raise ProviderError(
                "ONNX Runtime has no bfloat16 matrix product for CPUs",
                where=bundle,
                fix="Export with --dtype float32, or use provider 'cuda'.",
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4 if provider != "cpu" else 3  # its reason for falling back is told below
        try:
            self.session = ort.InferenceSession(bundle / MODEL, options, providers=[name])
        except Exception as error:  # its exception classes share no base but Exception
            reason = " ".join(str(error).split())[:300]
            raise BundleError(
                f"ONNX Runtime cannot load it: {reason}", where=bundle / MODEL, fix="Export it again."
            ) from error
        if self.session.get_providers()[0] != name:
            raise ProviderError(
                f"{name} could not start: its libraries (CUDA 13, cuDNN 9) or a GPU are missing",
                where=bundle,
                fix="Install them, or use provider 'cpu'.",
            )
        self.manifest, self.device = manifest, provider
        self._stored = _STORED[manifest.dtype]
        self._all = manifest.logits == "all"

    def new_cache(self, batch: int, capacity: int) -> OrtCache:
        """See Backend.

        Raises:
            CapacityError: more tokens than the bundle's rotary tables cover.
        """
        if capacity > self.manifest.cache.capacity:
            raise CapacityError(
                f"a cache of {capacity} tokens is over the bundle's capacity of {self.manifest.cache.capacity}",
                fix="Ask for fewer tokens.",
            )
        return OrtCache(self.manifest, batch, capacity, self.device)

    def prefill(self, cache: OrtCache, row: int, ids: NDArray[np.int64], chunk: int = CHUNK) -> NDArray[np.float32]:
        """See Backend; the row may have tokens already.

        Raises:
            CapacityError: the tokens do not fit the cache.
        """
        start = int(cache.lengths[row])
        self._check(cache, start + len(ids))
        parts = []
        binding = self.session.io_binding()
        self._bind_cache(binding, cache, row)
        for begin in range(0, len(ids), chunk):
            part = ids[None, begin : begin + chunk]  # [1, s]
            total = start + begin + part.shape[1]
            logits = self._run(binding, part, np.ones((1, total), np.int64))[0]  # [1 or s, V]
            parts.append(logits if self._all else logits[-1])
            cache.lengths[row] = total
        return np.concatenate(parts) if self._all else parts[-1]

    def decode(self, cache: OrtCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend.

        Raises:
            CapacityError: an active row is full.
        """
        total = int(cache.lengths.max()) + 1
        self._check(cache, int(cache.lengths[active].max(initial=0)) + 1)
        total = min(total, cache.capacity)
        if cache.binding is None:
            cache.binding = self.session.io_binding()
            self._bind_cache(cache.binding, cache, None)
        lengths = np.minimum(cache.lengths, total - 1)  # a full row that is not active overwrites its own last token
        mask = (np.arange(total) < lengths[:, None]).astype(
            np.int64
        )  # [B, T]: the past, and the new token in the last column
        mask[:, -1] = 1
        logits = self._run(cache.binding, tokens[:, None], mask)[:, -1]  # [B, V]
        cache.lengths[active] += 1
        return logits

    def _check(self, cache: OrtCache, tokens: int) -> None:
        if tokens > cache.capacity:
            raise CapacityError(
                f"{tokens} tokens do not fit a cache of {cache.capacity}",
                fix="Shorten the prompt or ask for fewer tokens.",
            )

    def _bind_cache(self, binding: Any, cache: OrtCache, row: int | None) -> None:
        """Bind the whole cache, or one row of it, as past and present: the same memory, so it is updated in place."""
        shape = cache.shape if row is None else (1, *cache.shape[1:])
        offset = 0 if row is None else row * cache.row_bytes
        for name, (value, _) in cache.values.items():
            place = (self.device, 0, cache.element_type, shape, value.data_ptr() + offset)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _run(self, binding: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, 1 or S, V] as float32."""
        ids = np.ascontiguousarray(ids)
        shape = (ids.shape[0], ids.shape[1] if self._all else 1, self.manifest.vocab_size)
        logits = np.empty(shape, self._stored)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu", 0, _ONNX_TYPES[self.manifest.dtype], shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        if self._stored is np.uint16:
            return (logits.astype(np.uint32) << 16).view(np.float32)
        return logits.astype(np.float32, copy=False)


def physical_cores() -> int:
    """Physical cores this process may use; hyperthreads only get into each other's way in matrix products."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
