"""The attention kernels' speed on a GPU: decode reads every key and value once, so its measure is bytes per second.

Part of `scripts/gpu_check`. Times are medians of CUDA events around graphs of many launches.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headfold.export.engine.kernels import compile_spec
from headfold.plugins.attention.cuda_launch import Kernels
from headfold.plugins.attention.kernel_contract import KernelSpec, workspace_bytes
from headfold.plugins.attention.launcher import Pointers, Shape
from headfold.plugins.dtypes import DTYPES
from headfold.runtime.device import Buffer, Device

LAUNCHES, ROUNDS = 20, 7
HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
CACHES = ("float16", "int8")
DECODES = ((1, 2048), (1, 32768), (16, 4096))  # rows, tokens behind each
PREFILL = 2048  # tokens


@dataclass(frozen=True)
class Timing:
    """One call of the op; `gb_per_s` is of keys and values."""

    heads: str
    cache: str
    what: str
    microseconds: float
    gb_per_s: float
    tflop_per_s: float


def time_kernels() -> list[Timing]:
    """Every kind of call, printed as it comes."""
    device, timings = Device(), []
    for title, (num_heads, kv_num_heads, head_dim) in HEADS.items():
        for stored in CACHES:
            spec = KernelSpec(
                num_heads=num_heads,
                kv_num_heads=kv_num_heads,
                head_dim=head_dim,
                rotary_dim=head_dim,
                dtype="float16",
                cache_dtype=stored,
            )
            with tempfile.TemporaryDirectory() as directory:
                compile_spec(spec, (device.capability,), Path(directory))
                kernels = Kernels(Path(directory), driver=device.driver)
            for rows, past, new in [(*decode, 1) for decode in DECODES] + [(1, 0, PREFILL)]:
                seconds = _time_call(device, kernels, rows, past, new)
                read = 2 * rows * kv_num_heads * (past + new) * head_dim * DTYPES[spec.cache_dtype].size  # K and V
                flops = 4 * rows * num_heads * head_dim * sum(range(past + 1, past + new + 1))  # Q K^T and P V, causal
                what = f"{rows} x {new} behind {past}"
                timing = Timing(title, stored, what, seconds * 1e6, read / seconds / 1e9, flops / seconds / 1e12)
                print(
                    f"attention of {title}, {stored} cache, {what}: {timing.microseconds:.1f} us, "
                    f"{timing.gb_per_s:.0f} GB/s, {timing.tflop_per_s:.1f} TFLOP/s",
                    flush=True,
                )
                timings.append(timing)
            kernels.close()
    return timings


def _time_call(device: Device, kernels: Kernels, rows: int, past: int, new: int) -> float:
    """Seconds of one call of the op with random numbers."""
    spec, rng, capacity = kernels.spec, np.random.default_rng(0), past + new

    def buffer(array: np.ndarray) -> Buffer:
        made = device.allocate(array.nbytes)
        device.upload(np.ascontiguousarray(array), made.address)
        return made

    def normal(*shape: int) -> Buffer:
        return buffer(rng.standard_normal(shape, np.float32).astype(np.float16))

    def cached() -> Buffer:
        shape = (rows, spec.kv_num_heads, capacity, spec.head_dim)
        if spec.cache_dtype == "int8":
            return buffer(rng.integers(-127, 128, shape, np.int8))
        return normal(*shape)

    scale = buffer(np.full(spec.kv_num_heads, 0.02, np.float32))
    buffers = {
        "query": normal(rows, new, spec.num_heads * spec.head_dim),
        "key": normal(rows, new, spec.kv_num_heads * spec.head_dim),
        "value": normal(rows, new, spec.kv_num_heads * spec.head_dim),
        "present_key": cached(),
        "present_value": cached(),
        "past_lengths": buffer(np.full(rows, past, np.int64)),
        "cos_cache": normal(capacity, spec.rotary_dim // 2),
        "sin_cache": normal(capacity, spec.rotary_dim // 2),
        "output": normal(rows, new, spec.num_heads * spec.head_dim),
        "key_scale": scale,
        "value_scale": scale,
    }
    workspace = device.allocate(max(workspace_bytes(spec, rows, new, capacity), 16))

    def launch() -> None:
        kernels.launch(
            Pointers(**{name: made.address for name, made in buffers.items()}),
            Shape(rows, new, capacity),
            scale=spec.head_dim**-0.5,
            window=-1,
            epsilon=1e-5,
            workspace=workspace.address,
            stream=device.stream,
        )

    return _seconds(device, launch)


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """Of one `work` among many in a graph: the median of some rounds."""

    def many() -> None:
        for _ in range(LAUNCHES):
            work()

    graph = device.capture(many)
    begin, end = (device.call("cuEventCreate", 0) for _ in range(2))
    times = []
    for _ in range(ROUNDS + 1):  # the first does not count
        device.call("cuEventRecord", begin, device.stream)
        graph.launch()
        device.call("cuEventRecord", end, device.stream)
        device.synchronize()
        times.append(device.call("cuEventElapsedTime", begin, end) / 1e3 / LAUNCHES)
    return float(statistics.median(times[1:]))
