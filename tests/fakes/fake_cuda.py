"""A CUDA driver without a GPU that has the functions headfold calls and is strict where the real one would corrupt or crash.

Memory is a list of live allocations: an address outside of them, or too few bytes behind it, is an error, and so are use after free,
double free and leaks. A kernel does nothing, but its arguments are read from where they were passed and checked against the contract,
so are the order append, decode, reduce and that nothing allocates or waits while a graph is captured. Results have cuda-python's form.
"""

import ctypes
import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headfold.plugins.attention.kernel_contract import (
    GRIDS,
    PARAMETERS,
    KernelEntry,
    KernelManifest,
    KernelSpec,
    grid,
    parameters,
    splits,
    tiles,
)
from headfold.plugins.dtypes import DTYPES


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_FOUND = 500


class Misuse(AssertionError):
    """What would corrupt memory, race or crash on a GPU."""


@dataclass
class Launch:
    """What a kernel was launched with."""

    kernel: str
    arguments: dict[str, int | float]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int


@dataclass
class FakeCuda:
    """Stands in for the module cuda.bindings.driver."""

    manifest: KernelManifest | None = None
    capability: int = 86
    memory_bytes: int = 1 << 40
    devices: int = 1
    allocations: dict[int, int] = field(default_factory=dict)  # address: bytes
    contents: dict[int, bytearray] = field(default_factory=dict)  # of what the host wrote, by address
    freed: set[int] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    batch: int = 1  # the kernels do not know B: the test says it
    capturing: bool = False
    graphs: dict[int, list[Any]] = field(default_factory=dict)
    recorded: list[Any] = field(default_factory=list)
    modules: dict[int, str] = field(default_factory=dict)  # handle: SHA-256 of the code
    streams: set[int] = field(default_factory=set)
    contexts: int = 0
    shared_allowed: dict[int, int] = field(default_factory=dict)
    _next: int = 0x10000

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    # Devices and contexts

    def cuInit(self, flags):
        return (Code.CUDA_SUCCESS if self.devices else Code.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGet(self, ordinal):
        return (Code.CUDA_SUCCESS, 0) if ordinal < self.devices else (Code.CUDA_ERROR_INVALID_VALUE, 0)

    def cuCtxGetDevice(self):
        return Code.CUDA_SUCCESS, 0

    def cuDeviceGetAttribute(self, attribute, device):
        return Code.CUDA_SUCCESS, self.capability // 10 if attribute == 75 else self.capability % 10

    def cuDevicePrimaryCtxRetain(self, device):
        self.contexts += 1
        return Code.CUDA_SUCCESS, 77

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts -= 1
        return (Code.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context):
        return (Code.CUDA_SUCCESS,)

    # Memory

    def cuMemAlloc(self, size):
        self._not_capturing("cuMemAlloc")
        if size <= 0 or size + sum(self.allocations.values()) > self.memory_bytes:
            return (Code.CUDA_ERROR_OUT_OF_MEMORY if size > 0 else Code.CUDA_ERROR_INVALID_VALUE), 0
        address, self._next = self._next, self._next + -(-size // 256) * 256 + 256  # a gap: neighbours do not touch
        self.allocations[address], self.contents[address] = size, bytearray(min(size, 1 << 20))
        return Code.CUDA_SUCCESS, address

    def cuMemFree(self, address):
        self._not_capturing("cuMemFree")
        if address not in self.allocations:
            raise Misuse(f"free of {address:#x}, {'freed before' if address in self.freed else 'never allocated'}")
        del self.allocations[address]
        self.freed.add(address)
        return (Code.CUDA_SUCCESS,)

    def check(self, address: int, size: int, what: str) -> None:
        """Whether these bytes are one live allocation's."""
        for begin, length in self.allocations.items():
            if begin <= address and address + size <= begin + length:
                return
        if any(begin == address for begin in self.freed):
            raise Misuse(f"{what}: use after free of {address:#x}")
        raise Misuse(f"{what}: {size} bytes at {address:#x} are not inside an allocation")

    def _at(self, address: int, size: int, what: str) -> memoryview:
        self.check(address, size, what)
        begin = max(start for start in self.allocations if start <= address)
        return memoryview(self.contents[begin])[address - begin : address - begin + size]

    def cuMemsetD8Async(self, address, value, size, stream):
        self._stream(stream)
        self.check(address, size, "cuMemsetD8Async")
        return self._do(lambda: None)

    def cuMemcpyHtoDAsync(self, address, host, size, stream):
        self._stream(stream)
        self.check(address, size, "cuMemcpyHtoDAsync")

        def copy() -> None:
            self._at(address, size, "cuMemcpyHtoDAsync")[:] = ctypes.string_at(host, size)

        return self._do(copy)

    def cuMemcpyDtoHAsync(self, host, address, size, stream):
        self._stream(stream)
        self.check(address, size, "cuMemcpyDtoHAsync")

        def copy() -> None:
            ctypes.memmove(host, bytes(self._at(address, size, "cuMemcpyDtoHAsync")), size)

        return self._do(copy)

    # Streams and graphs

    def cuStreamCreate(self, flags):
        self._next += 0x100
        self.streams.add(self._next)
        return Code.CUDA_SUCCESS, self._next

    def cuStreamDestroy(self, stream):
        self._stream(stream)
        self.streams.remove(stream)
        return (Code.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream):
        self._not_capturing("cuStreamSynchronize")
        self._stream(stream)
        return (Code.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream, mode):
        self._stream(stream)
        self._not_capturing("cuStreamBeginCapture")
        self.capturing, self.recorded = True, []
        return (Code.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        if not self.capturing:
            raise Misuse("cuStreamEndCapture without a begin")
        self.capturing = False
        self._next += 0x100
        self.graphs[self._next] = self.recorded
        return Code.CUDA_SUCCESS, self._next

    def cuGraphInstantiate(self, graph, flags):
        self._next += 0x100
        self.graphs[self._next] = self.graphs[graph]
        return Code.CUDA_SUCCESS, self._next

    def cuGraphDestroy(self, graph):
        del self.graphs[graph]
        return (Code.CUDA_SUCCESS,)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph, stream):
        self._stream(stream)
        if graph not in self.graphs:
            raise Misuse("launch of a graph that is gone")
        self.log.append("graph")
        for work in self.graphs[graph]:
            work()
        return (Code.CUDA_SUCCESS,)

    def record(self, work) -> None:
        """Do what an engine enqueues: now, or when the graph is launched."""
        self._do(work)

    def _do(self, work):
        if self.capturing:
            self.recorded.append(work)
        else:
            work()
        return (Code.CUDA_SUCCESS,)

    def _stream(self, stream) -> None:
        if int(stream) not in self.streams:
            raise Misuse(f"no such stream: {stream}")

    def _not_capturing(self, name: str) -> None:
        if self.capturing:
            raise Misuse(f"{name} while a graph is captured")

    # Modules and kernels

    def cuModuleLoadData(self, image):
        if image[:4] != b"\x7fELF":
            return Code.CUDA_ERROR_INVALID_IMAGE, 0
        self._next += 0x100
        self.modules[self._next] = hashlib.sha256(image).hexdigest()
        return Code.CUDA_SUCCESS, self._next

    def cuModuleUnload(self, module):
        if module not in self.modules:
            raise Misuse("unload of a module that is not loaded")
        del self.modules[module]
        return (Code.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, module, name):
        entry = self._entry(module)
        return (Code.CUDA_SUCCESS, module) if entry.entry.encode() == name else (Code.CUDA_ERROR_NOT_FOUND, 0)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.shared_allowed[function] = value
        return (Code.CUDA_SUCCESS,)

    def _entry(self, module):
        if module not in self.modules:
            raise Misuse("use of a kernel whose module is unloaded")
        found = [
            e for e in self.manifest.kernels if e.sha256 == self.modules[module] and e.capability == self.capability
        ]
        if not found:
            raise Misuse("the code is not for this GPU")
        return found[0]

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, addresses, extra):
        self._stream(stream)
        entry, spec = self._entry(function), self.manifest.spec
        if shared != entry.shared_bytes or shared > self.shared_allowed.get(function, 48 << 10):
            raise Misuse(f"{entry.kernel}: {shared} bytes of shared memory")
        if (bx, by, bz) != (32 * entry.num_warps, 1, 1) or extra:
            raise Misuse(f"{entry.kernel}: {bx} threads")
        count = len(entry.parameters) + 2
        places = (ctypes.c_void_p * count).from_address(addresses)
        arguments: dict[str, int | float] = {}
        for parameter, place in zip(entry.parameters, places, strict=False):
            kind = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}.get(parameter.type, ctypes.c_uint64)
            arguments[parameter.name] = kind.from_address(place).value
        if any(ctypes.c_uint64.from_address(place).value for place in places[-2:]):
            raise Misuse(f"{entry.kernel}: scratch memory that it does not use")
        launch = Launch(entry.kernel, arguments, (gx, gy, gz), bx, shared, int(stream))
        self._check_launch(launch, spec)
        self.launches.append(launch)
        self.log.append(entry.kernel)
        return self._do(lambda: self._check_launch(launch, spec))  # again when a graph runs it: memory may be gone

    def _check_launch(self, launch: Launch, spec) -> None:
        """Every pointer has the bytes its kernel touches, and the order is right."""
        a, kernel = launch.arguments, launch.kernel
        previous = self.launches[-1] if self.launches and self.launches[-1] is not launch else None
        if not self.capturing and launch in self.launches:
            previous = None  # a replay: its order was checked
        elif kernel in ("prefill", "decode") and (previous is None or previous.kernel != "append"):
            raise Misuse(f"{kernel} without append before it")
        elif kernel == "reduce" and (previous is None or previous.kernel != "decode"):
            raise Misuse("reduce without decode before it")
        if previous is not None and kernel in ("prefill", "decode"):
            for name in ("present_key", "present_value", "past_lengths", "new_tokens", "capacity"):
                if previous.arguments[name] != a[name]:
                    raise Misuse(f"{kernel} reads another {name} than append wrote")
        if previous is not None and previous.stream != launch.stream:
            raise Misuse(f"{kernel} is on another stream")
        if kernel == "reduce":
            before = self.launches[self.launches.index(launch) - 1] if launch in self.launches else previous
            new, capacity = before.arguments["new_tokens"], before.arguments["capacity"]
            if (a["partial"], a["lse"]) != (before.arguments["output"], before.arguments["lse"]):
                raise Misuse("reduce reads what decode did not write")
        else:
            new, capacity = a["new_tokens"], a["capacity"]
        size, cache, b = DTYPES[spec.dtype].size, DTYPES[spec.cache_dtype].size, self.batch
        rows, count = b * new * spec.num_heads, splits(spec, b, capacity)
        partial = rows * count * 4
        want = {
            "query": rows * spec.head_dim * size,
            "key": b * new * spec.kv_num_heads * spec.head_dim * size,
            "value": b * new * spec.kv_num_heads * spec.head_dim * size,
            "present_key": b * spec.kv_num_heads * capacity * spec.head_dim * cache,
            "present_value": b * spec.kv_num_heads * capacity * spec.head_dim * cache,
            "past_lengths": b * 8,
            "cos_cache": capacity * spec.rotary_dim // 2 * size,
            "sin_cache": capacity * spec.rotary_dim // 2 * size,
            "q_norm_weight": spec.head_dim * size if spec.qk_norm else 0,
            "k_norm_weight": spec.head_dim * size if spec.qk_norm else 0,
            "key_scale": spec.kv_num_heads * 4 if spec.quantized else 0,
            "value_scale": spec.kv_num_heads * 4 if spec.quantized else 0,
            "output": partial * spec.head_dim if kernel == "decode" else rows * spec.head_dim * size,
            "partial": partial * spec.head_dim,
            "lse": 0 if kernel == "prefill" else partial,
        }
        for name, value in a.items():
            if want.get(name):
                self.check(value, want[name], f"{kernel}: {name}")
        axes = grid(spec, GRIDS[kernel], tiles(spec, kernel).rows, b, new, capacity)
        if launch.grid != axes:
            raise Misuse(f"{kernel}: the grid is {launch.grid}, not {axes}")


def write_kernels(directory: Path, spec: KernelSpec, capabilities=(86, 90), shared: int = 20_000) -> KernelManifest:
    """A set whose code is no code, only distinct."""
    entries = []
    for capability in capabilities:
        for kernel in PARAMETERS:
            content = b"\x7fELF" + f"{kernel} {capability}".encode()
            entry = KernelEntry(
                kernel=kernel,
                capability=capability,
                file=f"{kernel}.{capability}.cubin",
                sha256=hashlib.sha256(content).hexdigest(),
                entry=kernel,
                parameters=parameters(spec, kernel),
                num_warps=4,
                shared_bytes=shared,
                registers=1,
                stack_bytes=0,
                grid=GRIDS[kernel],
                tile=tiles(spec, kernel).rows,
            )
            (directory / entry.file).write_bytes(content)
            entries.append(entry)
    manifest = KernelManifest(spec=spec, triton="3", source_sha256="0" * 64, kernels=entries)
    (directory / "kernels.json").write_text(manifest.model_dump_json())
    return manifest
