"""A TensorRT session with the interface of ONNX Runtime's: one cache on the GPU, bound as past and present, so updated in place.

Prefill goes row by row on views of the batch's cache; decode takes one token of every row. Each has its execution context, on its
optimization profile. Decode is captured as a CUDA graph: shapes stay the same while the attention mask, padded with zeros on its left,
keeps its width, which grows in steps of BUCKET. Works with TensorRT-RTX and TensorRT; both are imported when first needed.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.attention.cuda_launch import Kernels, LaunchError
from headfold.plugins.attention.kernel_contract import KernelFileError
from headfold.plugins.dtypes import DTYPES
from headfold.plugins.names import caches
from headfold.plugins.tensorrt_library import TensorRTMissing, open_tensorrt
from headfold.runtime.backend import decode_window, prefill_chunks, widened
from headfold.runtime.device import Device, Graph
from headfold.runtime.errors import BundleError, CapacityError, EngineError, InputError, ProviderError
from headfold.runtime.files.engine_file import REBUILD, check_engine
from headfold.runtime.manifest import EngineEntry, Manifest
from headfold.runtime.scheduling.host_rows import HostRows

BUCKET = 256  # positions: decode's mask is a multiple of it wide, so its graph is captured anew every so many tokens
PREFILL, DECODE = 0, 1  # optimization profiles
_IDS = 8  # bytes of an int64
_ALIGNMENT = 256  # bytes, of every tensor
_serials = itertools.count()


class TensorRTCache:
    """Keys and values of all layers in one allocation, and buffers for ids, mask and logits; freed when garbage-collected."""

    def __init__(self, device: Device, manifest: Manifest, entry: EngineEntry, batch: int, capacity: int) -> None:
        self.serial = next(_serials)
        self.host: HostRows | None = None
        dtype, spec = DTYPES[entry.dtype], manifest.cache
        self.capacity, self.lengths = capacity, np.zeros(batch, np.int64)
        ((heads, head_dim),) = set(spec.shapes)  # `build` refuses other models
        self.row_shape = (heads, entry.capacity, head_dim)
        self.row_bytes = int(np.prod(self.row_shape)) * DTYPES[manifest.cache_dtype].size
        names = caches(spec.num_hidden_layers).items()
        self.token_bytes = len(names) * self.row_bytes // entry.capacity
        tensor = -(-batch * self.row_bytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = device.allocate(len(names) * tensor, zero=True)
        self.addresses = {pair: self.memory.address + i * tensor for i, pair in enumerate(names)}
        rows = max(batch, entry.max_input if manifest.logits == "all" else 1)  # of logits in one step
        self.ids = device.allocate(max(batch, entry.max_input) * _IDS)
        self.mask = device.allocate(batch * entry.capacity * _IDS)
        self.device_logits = device.allocate(rows * manifest.vocab_size * dtype.size)
        self.logits = np.empty((batch, manifest.vocab_size), dtype.numpy)


@dataclass(frozen=True)
class _Step:
    """What decode's context is set up for: rows of a cache, and the width of the mask."""

    cache: int  # its serial number: a cache that was dropped must not be kept alive
    first: int
    end: int
    width: int


class TensorRTSession:
    """Runs one of a bundle's engines on the first visible GPU.

    Args:
        bundle: the bundle's directory, its files checked.
        manifest: the bundle's.
        attention: "native" or "plugin"; by default whichever of the bundle's engines fits this GPU comes first.
        driver: cuda.bindings.driver, `tensorrt` the module of a flavour: by default opened here; tests give theirs.
        tensorrt: see `driver`.

    Raises:
        ProviderError: no GPU, no driver, or this flavour of TensorRT is not installed.
        EngineError: no engine for this GPU, of another version of TensorRT, damaged, or its plugin or kernels are missing.
        BundleError: the bundle has no such engine, or it is not what the manifest says.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        attention: str | None = None,
        *,
        driver: Any = None,
        tensorrt: Any = None,
    ) -> None:
        entries = [e for e in manifest.engines if attention in (None, e.attention)]
        if not entries:
            what = f"engine with {attention} attention" if attention else "engine"
            raise BundleError(
                f"has no TensorRT {what}", where=bundle, fix=f"headfold build {bundle} --target tensorrt-rtx"
            )
        self.manifest, self.device = manifest, Device(driver)
        self.entry = _fitting(bundle, entries, self.device.capability)
        path = bundle / self.entry.file
        check_engine(bundle, self.entry)
        try:
            trt = open_tensorrt(self.entry.flavour) if tensorrt is None else tensorrt
        except TensorRTMissing as error:
            raise ProviderError(str(error), where="backend 'tensorrt'") from error
        if trt.__version__ != self.entry.version:
            raise EngineError(
                f"was built by {self.entry.flavour} {self.entry.version}, this is {trt.__version__}",
                where=path,
                fix=f"Install {self.entry.flavour}=={self.entry.version}, or build it again with headfold build --force.",
            )
        self._kernels = self._register_plugin(bundle, trt)
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        self.session = self._deserialize(trt, path)
        self._check_tensors(path)
        self._contexts = [self._context(path, profile) for profile in (PREFILL, DECODE)]
        self._step: _Step | None = None
        self._graph: Graph | None = None

    @property
    def gives_all_logits(self) -> bool:
        """See Backend."""
        return self.manifest.logits == "all"

    @property
    def gives_hidden_states(self) -> bool:
        """See Backend: engines have no such output."""
        return False

    def largest_cache(self, rows: int) -> tuple[int, int]:
        """See Backend."""
        return min(rows, self.entry.max_batch), self.entry.capacity

    def new_cache(self, batch: int, capacity: int) -> TensorRTCache:
        """See Backend. The engine's caches have one size, so a row takes the memory of the engine's capacity, whatever is asked.

        Raises:
            CapacityError: more rows or tokens than the engine was built for, or than the GPU has memory for.
        """
        for what, asked, most, option in (
            ("tokens", capacity, self.entry.capacity, "--capacity"),
            ("rows", batch, self.entry.max_batch, "--max-batch"),
        ):
            if asked > most:
                raise CapacityError(
                    f"a cache of {asked} {what} is over the engine's {most}",
                    fix=f"Ask for fewer, or build an engine with a larger {option}.",
                )
        self.device.make_current()
        return TensorRTCache(self.device, self.manifest, self.entry, batch, capacity)

    def prefill(
        self, cache: TensorRTCache, row: int, ids: NDArray[np.int64], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """See Backend; the row may have tokens already. As many as the engine's max_input are run at a time.

        Raises:
            CapacityError: the tokens do not fit the cache.
            EngineError: TensorRT cannot run.
        """
        every = self.manifest.logits == "all"
        self.device.make_current()
        chunk = self.entry.max_input if every or not all_logits else 1
        context, vocab = self._contexts[PREFILL], self.manifest.vocab_size
        result = np.empty((len(ids) if all_logits else 1, vocab), DTYPES[self.entry.dtype].numpy)
        self._bind_cache(context, cache, row)
        for step in prefill_chunks(cache, row, ids, chunk):
            self._feed(context, cache, step.ids, step.mask)
            self._run(context)
            if all_logits:
                self.device.download(cache.device_logits.address, result[step.begin : step.end])
            elif step.end == len(ids):
                behind = (
                    step.end - step.begin - 1 if every else 0
                ) * result.nbytes  # the last row of [s, V], or the only one
                self.device.download(cache.device_logits.address + behind, result)
        return widened(result if all_logits else result[0], self.entry.dtype)

    def hidden_states(self, cache: TensorRTCache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Backend."""
        raise InputError("a TensorRT engine gives no hidden states", fix="Use --backend onnxruntime.")

    def decode(self, cache: TensorRTCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend. Runs the rows from the first to the last active one.

        Raises:
            CapacityError: an active row is full.
            EngineError: TensorRT cannot run.
        """
        window = decode_window(cache, active)
        self.device.make_current()
        width = min(-(-window.total // BUCKET) * BUCKET, self.entry.capacity)
        ids = np.ascontiguousarray(tokens[window.first : window.end, None])  # [b, 1]
        self._decode(cache, _Step(cache.serial, window.first, window.end, width), ids, window.mask(width))
        self.device.download(cache.device_logits.address, cache.logits[window.first : window.end])
        cache.lengths[window.rows] += 1
        return widened(cache.logits, self.entry.dtype)

    def _decode(self, cache: TensorRTCache, step: _Step, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        """Run a step: as it is when it is the first of its kind, which TensorRT wants before a capture; captured at the second."""
        context = self._contexts[DECODE]
        if step != self._step:  # a context's graph is void once the context is changed
            if self._graph is not None:
                self._graph.close()
            self._step, self._graph = None, None
            self._bind_cache(context, cache, step.first)
            self._feed(context, cache, ids, mask)
            self._run(context)
            self._step = step
            return
        self.device.upload(ids, cache.ids.address)
        self.device.upload(mask, cache.mask.address)
        if self._graph is None and self._capturable(context):
            self._graph = self.device.capture(lambda: self._run(context))
        if self._graph is None:
            self._run(context)
        else:
            self._graph.launch()

    def _capturable(self, context: Any) -> bool:
        """TensorRT-RTX says no while it still compiles kernels in the background; then the next step asks again."""
        asks = getattr(context, "is_stream_capturable", None)
        return asks is None or bool(asks(self.device.stream))

    def _bind_cache(self, context: Any, cache: TensorRTCache, row: int) -> None:
        """Give past and present of every layer the same address: that of this row, and the rows behind it."""
        for pair, address in cache.addresses.items():
            place = address + row * cache.row_bytes
            for tensor in pair:
                self._accept(context.set_tensor_address(tensor, place), f"the address of {tensor}")

    def _feed(self, context: Any, cache: TensorRTCache, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
        """Shapes, addresses and contents of the other tensors."""
        shapes = {"input_ids": ids.shape, "attention_mask": mask.shape}
        shapes |= {past: (ids.shape[0], *cache.row_shape) for past, _ in cache.addresses}
        for name, shape in shapes.items():
            self._accept(context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
        buffers = {"input_ids": cache.ids, "attention_mask": cache.mask, "logits": cache.device_logits}
        for name, buffer in buffers.items():
            self._accept(context.set_tensor_address(name, buffer.address), f"the address of {name}")
        self.device.upload(ids, cache.ids.address)
        self.device.upload(mask, cache.mask.address)

    def _run(self, context: Any) -> None:
        self._log.errors.clear()
        self._accept(context.execute_async_v3(self.device.stream), "to run")

    def _accept(self, success: bool, what: str) -> None:
        if not success:
            raise EngineError(f"TensorRT refuses {what}{self._log.said()}", where=self.entry.file)

    def _register_plugin(self, bundle: Path, trt: Any) -> Kernels | None:
        """Load the engine's kernels and make its plugin known, if it has one."""
        plugin = self.entry.plugin
        if plugin is None:
            return None
        from headfold.plugins.attention import tensorrt_plugin as ours

        where, have = bundle / self.entry.file, (ours.NAMESPACE, ours.NAME, ours.PLUGIN_VERSION)
        if (plugin.namespace, plugin.name, plugin.version) != have:
            raise EngineError(
                f"needs the plugin {plugin.namespace}::{plugin.name} version {plugin.version}, "
                f"this headfold has {have[0]}::{have[1]} version {have[2]}",
                where=where,
                fix=REBUILD,
            )
        try:
            kernels = Kernels(bundle / plugin.kernels, self.device.capability, self.device.driver)
        except (LaunchError, KernelFileError) as error:
            raise EngineError(str(error), where=where, fix=REBUILD) from error
        try:
            ours.register(trt, kernels)
        except RuntimeError as error:
            kernels.close()
            raise EngineError(str(error), where=where, fix="Start a process without that plugin.") from error
        return kernels

    def _deserialize(self, trt: Any, path: Path) -> Any:
        content = path.read_bytes()
        validity = getattr(self._runtime, "get_engine_validity", None)  # TensorRT-RTX only
        if validity is not None:
            state, diagnostics = validity(content)
            if state == trt.EngineValidity.INVALID:
                known = trt.EngineInvalidityDiagnostics.__members__.items()
                reasons = [name.lower().replace("_", " ") for name, flag in known if int(diagnostics) & int(flag)]
                reason = ", ".join(reasons) or "no reason given"
                raise EngineError(f"TensorRT-RTX calls it invalid: {reason}", where=path, fix=REBUILD)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(f"TensorRT cannot load it{self._log.said()}", where=path, fix=REBUILD)
        if self.entry.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _check_tensors(self, path: Path) -> None:
        names = {self.session.get_tensor_name(i) for i in range(self.session.num_io_tensors)}
        wanted = {spec.name for spec in (*self.entry.inputs, *self.entry.outputs)}
        if names != wanted:
            odd = ", ".join(sorted(names ^ wanted)[:4])
            raise EngineError(f"its inputs and outputs are not those of the manifest: {odd}", where=path, fix=REBUILD)
        if self.session.num_optimization_profiles != len(self.entry.profiles):
            raise EngineError("its profiles are not those of the manifest", where=path, fix=REBUILD)

    def _context(self, path: Path, profile: int) -> Any:
        context = self.session.create_execution_context()
        if context is None:
            raise EngineError(
                f"TensorRT cannot make an execution context{self._log.said()}",
                where=path,
                fix="Free some of the GPU's memory, or build with a smaller --max-input or --max-batch.",
            )
        self._accept(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        self.device.synchronize()
        return context


def _fitting(bundle: Path, entries: list[EngineEntry], capability: int) -> EngineEntry:
    for entry in entries:
        if capability in entry.compute_capabilities:
            return entry
    known = ", ".join(map(str, sorted({c for entry in entries for c in entry.compute_capabilities})))
    raise EngineError(
        f"this GPU has compute capability {capability}, the bundle's engines are for {known}",
        where=bundle,
        fix=f"headfold build {bundle} --sm {capability}",
    )


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base is Any
        """Keeps TensorRT's errors for ours, instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def said(self) -> str:
            return f": {self.errors[-1][:300]}" if self.errors else ""

    return Logger()
