"""An ONNX Runtime session over one preallocated KV cache, bound as past and present, so that no token copies it.

Prefill goes row by row (the attention kernel takes several new tokens only for one sequence), on views of the batch's cache;
decode takes one token of every row. `Backend` is what another backend has to offer to be used by `generate`.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from headfold.runtime.errors import BundleError, CapacityError, InputError, ProviderError
from headfold.runtime.huge_pages import huge_pages
from headfold.runtime.manifest import MODEL, Manifest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CHUNK = 512  # tokens per prefill step: enough to keep matrix products efficient, few enough to bound their memory
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "float8_e4m3fn": 17}  # TensorProto.DataType
_STORED = {  # numpy has no bfloat16 and no float8: their bits
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "float8_e4m3fn": np.uint8,
}
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU per period, or "max"
_SILENT, _WARNING = 4, 2  # severities of ONNX Runtime's logger


class Cache(Protocol):
    """The KV cache of one batch."""

    lengths: NDArray[np.int64]  # [B] tokens in each row
    capacity: int  # tokens a row can have


AnyCache = TypeVar("AnyCache", bound=Cache)


class Backend(Protocol[AnyCache]):
    """What `generate` needs of an engine. Every backend refuses with CapacityError what does not fit its cache."""

    @property
    def session(self) -> Any:
        """The engine's own object, for people who bring their own loop."""
        ...

    def new_cache(self, batch: int, capacity: int) -> AnyCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        ...

    def prefill(
        self, cache: AnyCache, row: int, ids: NDArray[np.int64], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Append the tokens `ids` [S], S >= 1, to a row; logits [V] of the last, or [S, V] of all."""
        ...

    def decode(self, cache: AnyCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Append one token to each active row, `tokens` [B]; logits [B, V], valid until the next call.

        At least one row is active; the others keep what they have, and their logits are undefined.
        """
        ...


@dataclass
class _Window:
    """The rows that decode runs, and their binding."""

    first: int
    end: int
    binding: Any


class OrtCache:
    """Per layer keys and values [B, Hkv, C, D] on the session's device, and the logits [B, V] of decode."""

    def __init__(self, manifest: Manifest, batch: int, capacity: int, device: str) -> None:
        spec, stored = manifest.cache, _STORED[manifest.cache_dtype]
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        self.row_shape = (spec.num_key_value_heads, capacity, spec.head_dim)
        self.row_bytes = int(np.prod(self.row_shape)) * np.dtype(stored).itemsize
        self.logits = np.empty((batch, manifest.vocab_size), _STORED[manifest.dtype])
        self.window: _Window | None = None
        self.values = {  # on the CPU the array's own memory; its pages are taken when they are first written
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, *self.row_shape), stored), device, 0)
            for layer in range(spec.num_hidden_layers)
            for part in ("key", "value")
        }


class OrtSession:
    """Runs a bundle's graph; `provider` is "cpu" or "cuda", `threads` are the CPU provider's, by default `physical_cores`.

    Raises:
        ProviderError: the provider is unknown, not available, or cannot run this bundle.
        BundleError: ONNX Runtime cannot load the graph, or it is not the one of the manifest.
        InputError: less than one thread.
    """

    def __init__(self, bundle: Path, manifest: Manifest, provider: str = "cpu", threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}", fix="It must be 1 or more; leave it out for one per core.")
        self.manifest, self.device = manifest, provider
        with huge_pages() if provider == "cpu" else nullcontext():
            self.session = _open(bundle, manifest, provider, threads or physical_cores())
        self._element_type, self._stored = _ONNX_TYPES[manifest.dtype], _STORED[manifest.dtype]
        self._cache_type = _ONNX_TYPES[manifest.cache_dtype]
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

    def prefill(
        self, cache: OrtCache, row: int, ids: NDArray[np.int64], all_logits: bool = False, chunk: int = CHUNK
    ) -> NDArray[np.float32]:
        """See Backend; the row may have tokens already, and `chunk` of the new ones are run at a time.

        All logits of a bundle that computes only the last ones cost a step per token.

        Raises:
            CapacityError: the tokens do not fit the cache.
        """
        start = int(cache.lengths[row])
        _check(cache, start + len(ids))
        if all_logits and not self._all:
            chunk = 1
        computed = min(chunk, len(ids)) if self._all else 1  # rows of logits of one step
        logits = np.empty((len(ids) if all_logits else computed, self.manifest.vocab_size), self._stored)
        binding = self.session.io_binding()
        self._bind_cache(binding, cache, row, row + 1)
        for begin in range(0, len(ids), chunk):
            part = np.ascontiguousarray(ids[None, begin : begin + chunk])  # [1, s]
            computed = part.shape[1] if self._all else 1
            target = logits[begin : begin + computed] if all_logits else logits[:computed]  # [1 or s, V]
            self._bind_logits(binding, target[None])
            total = start + begin + part.shape[1]
            self._run(binding, part, np.ones((1, total), np.int64))
            cache.lengths[row] = total
        return self._widened(logits if all_logits else logits[computed - 1].copy())

    def decode(self, cache: OrtCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend. Runs the rows from the first to the last active one: a contiguous part of the cache, so nothing moves.

        Raises:
            CapacityError: an active row is full.
        """
        rows = np.flatnonzero(active)
        first, end = int(rows[0]), int(rows[-1]) + 1
        window = cache.window
        if window is None or (window.first, window.end) != (first, end):
            window = cache.window = _Window(first, end, self.session.io_binding())
            self._bind_cache(window.binding, cache, first, end)
            self._bind_logits(window.binding, cache.logits[first:end, None])
        _check(cache, int(cache.lengths[rows].max()) + 1)
        lengths = cache.lengths[first:end]
        total = min(int(lengths.max()) + 1, cache.capacity)
        # A row between two active ones runs along: its new key and value land behind its last, and count for nothing. Only
        # one that is full, so can never go on, has them land on its last.
        past = np.minimum(lengths, total - 1)
        mask = (np.arange(total) < past[:, None]).astype(np.int64)  # [b, T]
        mask[:, -1] = 1  # the new token
        self._run(window.binding, np.ascontiguousarray(tokens[first:end, None]), mask)
        cache.lengths[rows] += 1
        return self._widened(cache.logits)

    def _bind_cache(self, binding: Any, cache: OrtCache, first: int, end: int) -> None:
        """Bind rows of the cache as past and present: the same memory, so it is updated in place."""
        shape = (end - first, *cache.row_shape)  # [b, Hkv, C, D]
        for name, value in cache.values.items():
            place = (self.device, 0, self._cache_type, shape, value.data_ptr() + first * cache.row_bytes)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _bind_logits(self, binding: Any, logits: NDArray[Any]) -> None:
        """Have the logits written to host memory, [b, 1 or s, V]; who calls keeps it alive."""
        binding.bind_output("logits", "cpu", 0, self._element_type, logits.shape, logits.ctypes.data)

    def _run(self, binding: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        binding.bind_cpu_input("input_ids", ids)  # [b, s]
        binding.bind_cpu_input("attention_mask", mask)  # [b, T]
        self.session.run_with_iobinding(binding)

    def _widened(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        if self._stored is np.uint16:
            return (logits.astype(np.uint32) << 16).view(np.float32)
        return logits.astype(np.float32, copy=False)


def _check(cache: OrtCache, tokens: int) -> None:
    if tokens > cache.capacity:
        raise CapacityError(
            f"{tokens} tokens are {tokens - cache.capacity} over the {cache.capacity} of this cache",
            fix="Give fewer, or make a larger cache.",
        )


def _open(bundle: Path, manifest: Manifest, provider: str, threads: int) -> Any:
    """The InferenceSession, running on that provider for certain; see OrtSession."""
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
    if manifest.cache_dtype == "float8_e4m3fn" and provider == "cpu":
        raise ProviderError(
            "ONNX Runtime has no float8 cache on CPUs",
            where=bundle,
            fix="Export with --kv-cache int8, or use provider 'cuda'.",
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    if provider != "cpu":  # why it cannot start is logged on many lines, which no option of a session silences
        ort.set_default_logger_severity(_SILENT)
    try:
        session = ort.InferenceSession(bundle / MODEL, options, providers=[name], enable_fallback=0)
    except Exception as error:  # its exceptions have no other base
        raise BundleError(
            f"ONNX Runtime cannot load it: {str(error)[:300]}", where=bundle / MODEL, fix="Export it again."
        ) from error
    finally:
        if provider != "cpu":
            ort.set_default_logger_severity(_WARNING)  # its default
    if session.get_providers()[0] != name:
        raise ProviderError(
            f"{name} could not start: a GPU or its libraries (CUDA, cuDNN) are missing",
            where=f"provider {provider!r}",
            fix="Install them, or use provider 'cpu'.",
        )
    for kind, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        if [value.name for value in values] != [spec.name for spec in getattr(manifest, kind)]:
            raise BundleError(f"its {kind} are not those of the manifest", where=bundle / MODEL, fix="Export it again.")
    return session


def physical_cores() -> int:
    """Physical cores this process may use, by the machine, the process's affinity and its container's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CGROUP_QUOTA.is_file():
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            allowed = min(allowed, int(quota) // int(period))
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
