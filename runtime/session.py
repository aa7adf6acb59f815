"""An ONNX Runtime session over one preallocated KV cache, bound as past and present, so that no token copies it.

Prefill goes row by row (the attention kernel takes several new tokens only for one sequence), on views of the batch's cache;
decode takes one token of every row.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from headfold.plugins.dtypes import DTYPES
from headfold.plugins.names import HIDDEN_STATES
from headfold.runtime.backend import CHUNK, decode_window, prefill_chunks, widened
from headfold.runtime.cpu import physical_cores
from headfold.runtime.errors import BundleError, CapacityError, InputError, ProviderError
from headfold.runtime.files.graph_check import check_graph
from headfold.runtime.manifest import MODEL, Manifest
from headfold.runtime.scheduling.host_rows import HostRows, lazy_zeros
from headfold.runtime.weight_pages import give_back_mapped, huge_pages

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What must not be left to the CPU beside a GPU, with whatever is not of ONNX's own domain
_HEAVY = {"Attention", "Einsum", "Gemm", "MatMul", "RMSNormalization", "Softmax"}
SILENT, _WARNING = 4, 2  # severities of ONNX Runtime's logger; its errors come as exceptions, too
_AGAIN = "Export it again."
_MOST_THREADS = 1024  # ONNX Runtime takes any number, and makes them
_CPU_CHUNK = 256  # on CPUs attention gets slower with more queries at a time: 4.2 ms for 512 at once, 3.3 for two halves (measured)


@dataclass
class _Bound:
    """The rows that decode runs, and their binding."""

    first: int
    end: int
    binding: Any


class OrtCache:
    """Per layer keys and values [B, Hkv, C, D] on the session's device, and the logits [B, V] of decode."""

    def __init__(self, manifest: Manifest, batch: int, capacity: int, device: str) -> None:
        stored, tensors = DTYPES[manifest.cache_dtype].numpy, manifest.cache.tensors
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        self.row_shapes = {names: (heads, capacity, head_dim) for names, (heads, head_dim) in tensors.items()}
        self.itemsize = np.dtype(stored).itemsize
        self.logits = np.empty((batch, manifest.vocab_size), DTYPES[manifest.dtype].numpy)
        self.bound: _Bound | None = None
        zeros = lazy_zeros if device == "cpu" else np.zeros
        arrays = {names: zeros((batch, *shape), np.dtype(stored)) for names, shape in self.row_shapes.items()}
        self.host = HostRows(arrays.values()) if device == "cpu" else None
        self.token_bytes = _token_bytes(manifest)
        self.values = {  # on the CPU the array's own memory
            names: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for names, array in arrays.items()
        }


class OrtSession:
    """Runs a bundle's graph; `provider` is "cpu" or "cuda", `threads` are the CPU provider's, by default `physical_cores`.

    `shares` the cores with another session's threads: its own do not wait for the next step in a loop, as they would for a while.

    Raises:
        ProviderError: the provider is unknown, not available, or cannot run this bundle.
        BundleError: ONNX Runtime cannot load the graph, or it is not the one of the manifest.
        InputError: less than one thread.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        provider: str = "cpu",
        threads: int | None = None,
        *,
        shares: bool = False,
    ) -> None:
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= _MOST_THREADS):
            fix = f"It must be a whole number, 1 to {_MOST_THREADS}; leave it out for one per core."
            raise InputError(f"threads is {threads!r}", fix=fix)
        self.manifest, self.device = manifest, provider
        with huge_pages() if provider == "cpu" else nullcontext():
            self.session = _open(bundle, manifest, provider, threads or physical_cores(), shares)
            give_back_mapped(bundle / f"{MODEL}.data")  # before pages move, which would keep it waiting
        self._path = bundle / MODEL
        check_graph(self.session.get_inputs(), self.session.get_outputs(), self._path, manifest)
        self._dtype, self._cache_type = DTYPES[manifest.dtype], DTYPES[manifest.cache_dtype].onnx
        self._all = manifest.logits == "all"
        self._chunk = _CPU_CHUNK if provider == "cpu" else CHUNK

    @property
    def gives_all_logits(self) -> bool:
        """See Backend."""
        return self._all

    @property
    def gives_hidden_states(self) -> bool:
        """See Backend."""
        return self.manifest.hidden_size is not None

    def largest_cache(self, rows: int) -> tuple[int, int]:
        """See Backend. On a CPU all rows at their longest take at most half of the free memory; one row is always allowed."""
        capacity = self.manifest.cache.capacity
        if self.device == "cpu":
            free = psutil.virtual_memory().available
            rows = max(1, min(rows, free // 2 // (_token_bytes(self.manifest) * capacity)))
        return rows, capacity

    def new_cache(self, batch: int, capacity: int) -> OrtCache:
        """See Backend.

        Raises:
            CapacityError: more tokens than the bundle's rotary tables cover, or no memory for them.
        """
        if capacity > self.manifest.cache.capacity:
            raise CapacityError(
                f"a cache of {capacity} tokens is over the bundle's capacity of {self.manifest.cache.capacity}",
                fix="Ask for fewer tokens.",
            )
        try:
            return OrtCache(self.manifest, batch, capacity, self.device)
        except (MemoryError, RuntimeError) as error:  # of numpy, of ONNX Runtime
            raise CapacityError(
                f"there is no memory for a cache of {batch} x {capacity} tokens",
                fix="Ask for fewer tokens, or fewer prompts at a time.",
            ) from error

    def prefill(
        self, cache: OrtCache, row: int, ids: NDArray[np.int64], all_logits: bool = False, chunk: int | None = None
    ) -> NDArray[np.float32]:
        """See Backend; the row may have tokens already, and at most `chunk` of the new ones are run at a time.

        All logits of a bundle that computes only the last ones cost a step per token.

        Raises:
            CapacityError: the tokens do not fit the cache.
        """
        chunk = 1 if all_logits and not self._all else chunk or self._chunk
        computed = min(chunk, len(ids)) if self._all else 1  # rows of logits of one step
        logits = np.empty((len(ids) if all_logits else computed, self.manifest.vocab_size), self._dtype.numpy)
        binding = self.session.io_binding()
        self._bind_cache(binding, cache, row, row + 1)
        for step in prefill_chunks(cache, row, ids, chunk):
            computed = step.end - step.begin if self._all else 1
            target = logits[step.begin : step.begin + computed] if all_logits else logits[:computed]  # [1 or s, V]
            self._bind_logits(binding, target[None])
            self._run(binding, step.ids, step.mask)
        return widened(logits if all_logits else logits[computed - 1].copy(), self.manifest.dtype)

    def hidden_states(self, cache: OrtCache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Backend.

        Raises:
            InputError: the bundle has no such output.
            CapacityError: the tokens do not fit the cache.
        """
        size = self.manifest.hidden_size
        if size is None:
            raise InputError("gives no hidden states", where=self._path, fix="Export it with --hidden-states.")
        states = np.empty((len(ids), size), self._dtype.numpy)
        binding = self.session.io_binding()
        self._bind_cache(binding, cache, row, row + 1)
        for step in prefill_chunks(cache, row, ids, self._chunk):
            target = states[None, step.begin : step.end]  # [1, s, hidden]
            binding.bind_output(HIDDEN_STATES, "cpu", 0, self._dtype.onnx, target.shape, target.ctypes.data)
            self._run(binding, step.ids, step.mask)
        return widened(states, self.manifest.dtype)

    def decode(self, cache: OrtCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend.

        Raises:
            CapacityError: an active row is full.
        """
        window = decode_window(cache, active)
        first, end, bound = window.first, window.end, cache.bound
        if bound is None or (bound.first, bound.end) != (first, end):
            bound = cache.bound = _Bound(first, end, self.session.io_binding())
            self._bind_cache(bound.binding, cache, first, end)
            self._bind_logits(bound.binding, cache.logits[first:end, None])
        mask = window.mask(min(window.total, cache.capacity))
        self._run(bound.binding, np.ascontiguousarray(tokens[first:end, None]), mask)
        cache.lengths[window.rows] += 1
        return widened(cache.logits, self.manifest.dtype)

    def _bind_cache(self, binding: Any, cache: OrtCache, first: int, end: int) -> None:
        """Bind rows of the cache as past and present: the same memory, so it is updated in place."""
        for (past, present), row in cache.row_shapes.items():
            shape = (end - first, *row)  # [b, Hkv, C, D]
            address = cache.values[past, present].data_ptr() + first * math.prod(row) * cache.itemsize
            place = (self.device, 0, self._cache_type, shape, address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def _bind_logits(self, binding: Any, logits: NDArray[Any]) -> None:
        """Have the logits written to host memory, [b, 1 or s, V]; who calls keeps it alive."""
        binding.bind_output("logits", "cpu", 0, self._dtype.onnx, logits.shape, logits.ctypes.data)

    def _run(self, binding: Any, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        binding.bind_cpu_input("input_ids", ids)  # [b, s]
        binding.bind_cpu_input("attention_mask", mask)  # [b, T]
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no other base
            raise BundleError(f"ONNX Runtime cannot run it: {error}", where=self._path, fix=_AGAIN) from error


def _token_bytes(manifest: Manifest) -> int:
    """What a token takes in a row of the cache."""
    numbers = sum(heads * head_dim for heads, head_dim in manifest.cache.tensors.values())
    return numbers * DTYPES[manifest.cache_dtype].size


def _open(bundle: Path, manifest: Manifest, provider: str, threads: int, shares: bool) -> Any:
    """The InferenceSession, running on that provider for certain; see OrtSession."""
    if provider not in [*PROVIDERS]:
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
    options.log_severity_level = SILENT
    if shares:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider != "cpu":
        _prepare_cuda(options)
    try:
        with silenced():
            session = ort.InferenceSession(bundle / MODEL, options, providers=[name], enable_fallback=0)
    except Exception as error:  # its exceptions have no other base
        raise BundleError(f"ONNX Runtime cannot load it: {error}", where=bundle / MODEL, fix=_AGAIN) from error
    if session.get_providers()[0] != name:
        raise ProviderError(
            f"{name} could not start: a GPU or its libraries (CUDA, cuDNN) are missing",
            where=f"provider {provider!r}",
            fix="Install them, or use provider 'cpu'.",
        )
    if provider != "cpu":
        _check_kernels(session, bundle, manifest)
    return session


@contextmanager
def silenced() -> Iterator[None]:
    """Inside the block ONNX Runtime does not log what no option of a session silences.

    That is why CUDA cannot start, on many lines; and that experts in few bits multiply inputs that are not rounded, as they should.
    """
    ort.set_default_logger_severity(SILENT)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNING)  # its default


def _prepare_cuda(options: Any) -> None:
    # Without this, 1.31 computes in place what a CUDA node has still to read on the CPU: the limit of a Range was 0
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with redirect_stdout(io.StringIO()):  # it prints what is missing
        ort.preload_dlls()  # of NVIDIA's wheels; nothing else makes them be found


def _check_kernels(session: Any, bundle: Path, manifest: Manifest) -> None:
    """Refuse what would compute on the CPU between nodes on the GPU: slow, and a cache that is copied back and forth goes wrong.

    ONNX Runtime leaves ops without a CUDA kernel to the CPU, and says nothing. What computes with shapes belongs there. Its CUDA kernel
    for experts in few bits is another one, which nobody has held to the proof.
    """
    all_parts = session.get_provider_graph_assignment_info()
    if any(node.op_type == "QMoE" for part in all_parts for node in part.get_nodes()):
        fix = "Use provider 'cpu', or export without --weights."
        raise ProviderError("experts in four or eight bits have not been tried with CUDA", where=bundle, fix=fix)
    parts = [part for part in all_parts if part.ep_name == PROVIDERS["cpu"]]
    nodes = [node for part in parts for node in part.get_nodes() if node.domain or node.op_type in _HEAVY]
    if nodes:
        ops = ", ".join(sorted({node.op_type for node in nodes}))
        raise ProviderError(
            f"ONNX Runtime has no CUDA kernel for {ops} in {manifest.dtype}",
            where=bundle,
            fix="Export with --dtype float16 or bfloat16, or use provider 'cpu'.",
        )
