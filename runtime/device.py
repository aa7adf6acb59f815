"""One GPU through cuda-python's driver API: its memory, one stream, copies, and graphs. Every failure is a ProviderError of one line.

Work is put on the stream in order; `download` waits for it. Memory is freed when its Buffer is closed or garbage-collected.
"""

import weakref
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from headfold.plugins.attention.cuda_launch import DriverError, LaunchError, call, capability_of, open_driver
from headfold.runtime.errors import CapacityError, ProviderError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_FIX = "Use backend 'onnxruntime', or a machine with an NVIDIA GPU and its driver."


class Buffer:
    """Bytes on the GPU, from `address` on."""

    def __init__(self, device: "Device", size: int) -> None:
        self.size = size
        try:
            self.address = int(device.call("cuMemAlloc", size))
        except ProviderError as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise
            raise CapacityError(
                f"the GPU has no {size / 1e9:.2f} GB left", fix="Use a smaller batch, or an engine of less capacity."
            ) from error
        self.close = weakref.finalize(self, device.free, self.address)  # runs once
        self.close.atexit = False  # the driver frees what a process leaves


class Device:
    """A GPU's primary context, which TensorRT uses too, and a stream.

    Args:
        driver: cuda.bindings.driver; opened here by default.
        ordinal: which GPU, as CUDA_VISIBLE_DEVICES numbers them.

    Raises:
        ProviderError: no cuda-python, no driver, or no such GPU.
    """

    def __init__(self, driver: Any = None, ordinal: int = 0) -> None:
        try:
            self.driver = open_driver() if driver is None else driver
        except LaunchError as error:
            raise ProviderError(str(error), where="backend 'tensorrt'", fix=_FIX) from error
        self._handle = self.call("cuDeviceGet", ordinal)
        self.context = self.call("cuDevicePrimaryCtxRetain", self._handle)
        self.call("cuCtxSetCurrent", self.context)
        self.capability = capability_of(self.driver, self._handle)
        self.stream = int(self.call("cuStreamCreate", _NON_BLOCKING))

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver: its result. Raises ProviderError."""
        try:
            return call(self.driver, name, *arguments)
        except DriverError as error:
            raise ProviderError(str(error), where="CUDA driver") from error

    def make_current(self) -> None:
        """Make the context this thread's; whatever is called from a thread pool needs it."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, size: int, zero: bool = False) -> Buffer:
        """New memory of `size` bytes. Raises CapacityError if there is not so much left."""
        buffer = Buffer(self, size)
        if zero:
            self.call("cuMemsetD8Async", buffer.address, 0, size, self.stream)
        return buffer

    def free(self, address: int) -> None:
        """Free memory; nothing on the stream may still use it."""
        self.make_current()
        self.call("cuMemFree", address)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the GPU; it may be changed as soon as this returns, for it is not page-locked."""
        assert array.flags.c_contiguous
        self.call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Wait for the stream's work, and copy from the GPU into a contiguous array."""
        assert array.flags.c_contiguous
        assert array.flags.writeable
        self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything on the stream; errors of earlier work show here."""
        self.call("cuStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> "Graph":
        """Record what `work` puts on the stream, without doing it."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        try:
            work()
        finally:
            graph = self.call("cuStreamEndCapture", self.stream)  # also after a failure: the stream is of use again
        try:
            return Graph(self, self.call("cuGraphInstantiate", graph, 0))
        finally:
            self.call("cuGraphDestroy", graph)


class Graph:
    """Captured work, to be launched as one."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle
        self.close = weakref.finalize(self, device.call, "cuGraphExecDestroy", handle)
        self.close.atexit = False

    def launch(self) -> None:
        """Put the work on the stream."""
        self._device.call("cuGraphLaunch", self._handle, self._device.stream)
