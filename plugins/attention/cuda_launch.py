"""Load compiled kernels and launch them through cuda-python: no torch, no Triton, no allocation and no synchronisation in a launch.

So a CUDA graph can capture it. `Kernels` is the `Launcher` of the TensorRT plugin. Every failure is a LaunchError of one line.
"""

import ctypes
from pathlib import Path
from typing import Any

from headfold.plugins.attention.kernel_contract import (
    SCRATCH,
    KernelEntry,
    KernelFileError,
    KernelName,
    KernelSpec,
    decodes,
    grid,
    parameters,
    partial_bytes,
    read_cubin,
    read_kernels,
    splits,
)
from headfold.plugins.attention.launcher import Pointers, Shape
from headfold.plugins.attention.schema import NORMS, SCALES

_CTYPES: dict[str, Any] = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}
_STATIC_SHARED = 48 << 10  # bytes of shared memory that every kernel may use; for more it has to be asked
_ALIGNMENT = 16  # bytes: what the kernels are compiled for
_WARP = 32


class LaunchError(Exception):
    """The kernels cannot run; the message is one line."""


class NoDriver(LaunchError):
    """cuda-python or NVIDIA's driver is not installed."""


class NoDevice(LaunchError):
    """The driver sees no GPU."""


class NoKernel(LaunchError):
    """The set has no kernels for this GPU's compute capability."""


class DriverError(LaunchError):
    """A call of the driver failed."""


def open_driver() -> Any:
    """The module cuda.bindings.driver, initialized.

    Raises:
        NoDriver: it, or libcuda, is not installed.
        NoDevice: there is no GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoDriver("cuda-bindings is not installed: pip install 'headfold[tensorrt-rtx]'") from error
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:  # cuda-python looks for libcuda at the first call
        raise NoDriver("NVIDIA's driver (libcuda) is not installed") from error
    if code.name in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_SYSTEM_NOT_READY"):
        raise NoDevice("the CUDA driver sees no GPU")
    if code.value:
        raise DriverError(f"cuInit: {code.name}")
    return driver


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the driver: its result, a tuple if there are several, or None. Raises DriverError."""
    code, *results = getattr(driver, name)(*arguments)
    if code.value:
        raise DriverError(f"{name}: {code.name}")
    return results[0] if len(results) == 1 else tuple(results) or None


def capability_of(driver: Any, device: Any) -> int:
    """A GPU's compute capability, 86 for 8.6."""
    attribute = driver.CUdevice_attribute
    major = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return int(major) * 10 + int(minor)


class Kernels:
    """A set of kernels, loaded into the current context; see `headfold.plugins.attention.launcher.Launcher`.

    Args:
        directory: has a kernels.json.
        capability: whose kernels to load; by default the current context's device's.
        driver: cuda.bindings.driver, by default opened here.

    Raises:
        LaunchError: see the classes above.
        KernelFileError: the set is incomplete or altered, or of another version of headfold.
    """

    def __init__(self, directory: Path, capability: int | None = None, driver: Any = None) -> None:
        self._modules: list[Any] = []
        self._driver = driver = open_driver() if driver is None else driver
        manifest = read_kernels(directory)
        self.spec: KernelSpec = manifest.spec
        if capability is None:
            capability = capability_of(driver, call(driver, "cuCtxGetDevice"))
        self._entries = {entry.kernel: entry for entry in manifest.kernels if entry.capability == capability}
        if not self._entries:
            known = ", ".join(map(str, manifest.capabilities))
            raise NoKernel(f"{directory} has no kernels for compute capability {capability}, only for {known}")
        self._functions: dict[KernelName, Any] = {}
        try:
            for entry in self._entries.values():
                self._functions[entry.kernel] = self._load(directory, entry)
        except Exception:
            self.close()
            raise

    def _load(self, directory: Path, entry: KernelEntry) -> Any:
        if entry.parameters != parameters(self.spec, entry.kernel):
            raise KernelFileError(f"{directory / entry.file}: takes other parameters than this headfold passes")
        module = call(self._driver, "cuModuleLoadData", read_cubin(directory, entry))
        self._modules.append(module)
        function = call(self._driver, "cuModuleGetFunction", module, entry.entry.encode())
        if entry.shared_bytes > _STATIC_SHARED:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(self._driver, "cuFuncSetAttribute", function, attribute, entry.shared_bytes)
        return function

    def close(self) -> None:
        """Unload the kernels; nothing may be running that uses them."""
        modules, self._modules, self._functions = self._modules, [], {}
        for module in modules:
            call(self._driver, "cuModuleUnload", module)

    def launch(
        self,
        pointers: Pointers,
        shape: Shape,
        *,
        scale: float,
        window: int,
        epsilon: float,
        workspace: int,
        stream: int,
    ) -> None:
        """Put append and attention on the stream.

        `workspace` is the address of `workspace_bytes(spec, B, S, C)` bytes, 0 if that is 0; it is free again when the stream is there.

        Raises:
            LaunchError: a null or misaligned address, an empty shape, closed kernels, or the driver refuses.
        """
        split = decodes(self.spec, shape.new_tokens)
        self._check(pointers, shape, workspace if split else None)
        values: dict[str, int | float] = vars(pointers) | {
            "new_tokens": shape.new_tokens,
            "capacity": shape.capacity,
            "window": window,
            "scale": scale,
            "epsilon": epsilon,
            "lse": 0,
        }
        self._launch("append", shape, values, stream)
        if not split:
            self._launch("prefill", shape, values, stream)
            return
        sizes = (shape.batch, shape.new_tokens, shape.capacity)
        lse = workspace + partial_bytes(self.spec, *sizes)
        self._launch("decode", shape, values | {"output": workspace, "lse": lse}, stream)
        count = splits(self.spec, shape.batch, shape.capacity)
        self._launch("reduce", shape, values | {"partial": workspace, "lse": lse, "splits": count}, stream)

    def _launch(self, kernel: KernelName, shape: Shape, values: dict[str, int | float], stream: int) -> None:
        entry = self._entries[kernel]
        sizes = grid(self.spec, entry.grid, entry.tile, shape.batch, shape.new_tokens, shape.capacity)
        arguments = [_CTYPES.get(p.type, ctypes.c_void_p)(values[p.name]) for p in entry.parameters]
        arguments += [ctypes.c_void_p(0) for _ in SCRATCH]
        # The driver copies the arguments before it returns
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        block = (_WARP * entry.num_warps, 1, 1)
        function, place = self._functions[kernel], ctypes.addressof(addresses)
        call(self._driver, "cuLaunchKernel", function, *sizes, *block, entry.shared_bytes, stream, place, 0)

    def _check(self, pointers: Pointers, shape: Shape, workspace: int | None) -> None:
        """`workspace` is None where none is used."""
        if not self._functions:
            raise LaunchError("the kernels are closed")
        for size, number in vars(shape).items():
            if number < 1:
                raise LaunchError(f"{size} is {number}")
        optional = {*([] if self.spec.qk_norm else NORMS), *([] if self.spec.quantized else SCALES)}
        addresses = vars(pointers) | ({} if workspace is None else {"workspace": workspace})
        for name, address in addresses.items():
            if not address and name not in optional:
                raise LaunchError(f"{name} is a null pointer")
            if address % _ALIGNMENT:
                raise LaunchError(f"{name} is at {address:#x}, which is not aligned to {_ALIGNMENT} bytes")
