"""Random calls of the op, what the reference makes of them, and how close kernels must come.

Tolerances: an element of the output is a mean of values of order 1, so float32 is off by a few of its eps in the products and
exponentials, float16 and bfloat16 by the rounding of queries, keys, weights and output (eps 1e-3 and 8e-3 each).
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from headfold.plugins.attention.cuda_launch import Kernels
from headfold.plugins.attention.kernel_contract import KernelSpec, workspace_bytes
from headfold.plugins.attention.launcher import Pointers, Shape
from headfold.plugins.attention.reference import grouped_query_attention
from headfold.plugins.attention.schema import AttentionInputs, Attributes
from headfold.runtime.device import Device

TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass
class Problem:
    """One call of the op, in float32; `spec` says in which dtypes the kernels see it."""

    spec: KernelSpec
    past: list[int]
    new: int
    capacity: int
    window: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        rng, s, batch = np.random.default_rng(self.seed), self.spec, len(self.past)

        def normal(*shape: int) -> np.ndarray:  # representable in the dtype, so that the reference sees the same
            return torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, s.dtype)).float().numpy()

        angles = np.arange(self.capacity)[:, None] / 10000 ** (np.arange(0, s.rotary_dim, 2) / s.rotary_dim)
        to = getattr(torch, s.dtype)
        self.feeds = {
            "query": normal(batch, self.new, s.num_heads * s.head_dim),
            "key": normal(batch, self.new, s.kv_num_heads * s.head_dim),
            "value": normal(batch, self.new, s.kv_num_heads * s.head_dim),
            "past_key": normal(batch, s.kv_num_heads, self.capacity, s.head_dim),
            "past_value": normal(batch, s.kv_num_heads, self.capacity, s.head_dim),
            "past_lengths": np.array(self.past, np.int64),
            "cos_cache": torch.from_numpy(np.cos(angles)).to(to).float().numpy(),
            "sin_cache": torch.from_numpy(np.sin(angles)).to(to).float().numpy(),
        }
        if s.qk_norm:
            self.feeds |= {"q_norm_weight": normal(s.head_dim), "k_norm_weight": normal(s.head_dim)}
        if s.cache_dtype == "int8":
            scales = rng.uniform(0.01, 0.03, (2, s.kv_num_heads)).astype(np.float32)
            self.feeds |= {"key_scale": scales[0], "value_scale": scales[1]}
            for name in ("past_key", "past_value"):
                self.feeds[name] = rng.integers(-128, 128, self.feeds[name].shape).astype(np.int8)
        if s.cache_dtype == "float8_e4m3fn":
            scales = rng.uniform(0.5, 2, (2, s.kv_num_heads)).astype(np.float32)
            self.feeds |= {"key_scale": scales[0], "value_scale": scales[1]}
            for name in ("past_key", "past_value"):
                self.feeds[name] = self.feeds[name].astype(ml_dtypes.float8_e4m3fn)
        self.attributes = Attributes(
            s.num_heads,
            s.kv_num_heads,
            s.head_dim**-0.5,
            self.window,
            s.softcap,
            int(s.rotary_interleaved),
            1e-3,
        )

    def reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return grouped_query_attention(AttentionInputs(**self.feeds, total_sequence_length=0), self.attributes)

    def tensors(self, poison: bool = True) -> dict[str, torch.Tensor]:
        """The feeds as the kernels see them. What lies behind a cache's last token is undefined: NaN, which must not leak."""
        s = self.spec
        kept = {"past_lengths", "key_scale", "value_scale"} | ({"past_key", "past_value"} if s.quantized else set())
        tensors = {}
        for name, x in self.feeds.items():
            if x.dtype == ml_dtypes.float8_e4m3fn:
                tensors[name] = torch.from_numpy(x.copy().view(np.uint8)).view(torch.float8_e4m3fn)
                continue
            tensor = torch.from_numpy(x.copy())
            tensors[name] = tensor if name in kept else tensor.to(getattr(torch, s.dtype))
        for row, length in enumerate(self.past):
            if poison and not s.quantized:
                tensors["past_key"][row, :, length:] = float("nan")
                tensors["past_value"][row, :, length:] = float("nan")
        return tensors

    def launch(self, device: Device, kernels: Kernels, captured: bool = False) -> tuple[np.ndarray, ...]:
        """Run it as the plugin does; `captured` in a CUDA graph that is launched twice, which makes no difference."""
        s, a, batch = self.spec, self.attributes, len(self.past)
        tensors = self.tensors()
        tensors["output"] = torch.zeros_like(tensors["query"])
        buffers = {name: device.allocate(_bits(tensor).nbytes) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            device.upload(_bits(tensor), buffers[name].address)
        size = workspace_bytes(s, batch, self.new, self.capacity)
        workspace = device.allocate(size) if size else None
        present = {"past_key": "present_key", "past_value": "present_value"}
        pointers = Pointers(**{present.get(name, name): buffer.address for name, buffer in buffers.items()})

        def work() -> None:
            kernels.launch(
                pointers,
                Shape(batch, self.new, self.capacity),
                scale=a.scale,
                window=a.local_window_size,
                epsilon=a.qk_norm_epsilon,
                workspace=workspace.address if workspace else 0,
                stream=device.stream,
            )

        if captured:
            graph = device.capture(work)
            graph.launch()
            graph.launch()
        else:
            work()
        results = []
        for name in ("output", "past_key", "past_value"):
            array = _bits(tensors[name]).copy()
            device.download(buffers[name].address, array)
            back = torch.from_numpy(array).view(tensors[name].dtype)
            results.append(back.numpy() if back.dtype == torch.int8 else back.float().numpy())
        return tuple(results)

    def compare(self, actual: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Output and caches, against the reference."""
        expected, tolerance = self.reference(), TOLERANCES[self.spec.dtype]
        kind = self.spec.cache_dtype
        if kind == "float8_e4m3fn":  # a new key that is rounded the other way is 1/16 off
            tolerance = 5e-2
        np.testing.assert_allclose(actual[0], expected[0], atol=tolerance, rtol=tolerance)
        for row, length in enumerate(self.past):
            end = length + self.new
            for cache, name in ((1, "past_key"), (2, "past_value")):
                a, e = (x[cache][row, :, :end].astype(np.float32) for x in (actual, expected))
                if self.spec.quantized:  # a value halfway between two numbers may be rounded either way
                    step = 1 if kind == "int8" else np.maximum(np.abs(e) / 8, 2**-9)
                    assert (np.abs(a - e) <= step).all()
                    assert (a != e).mean() < (0.01 if kind == "int8" else 0.05)
                else:
                    np.testing.assert_allclose(a, e, atol=tolerance, rtol=tolerance)
                assert (a[:, :length] == self.feeds[name][row, :, :length].astype(np.float32)).all()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """As numpy, which has no bfloat16 and no float8."""
    other = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}.get(tensor.dtype, tensor.dtype)
    return tensor.view(other).numpy()


def spec(heads: tuple[int, int] = (6, 2), head_dim: int = 64, dtype: str = "float32", **options) -> KernelSpec:
    """A spec with all dimensions rotated and an unquantized cache, unless told otherwise."""
    defaults = {"rotary_dim": head_dim, "cache_dtype": dtype}
    return KernelSpec(num_heads=heads[0], kv_num_heads=heads[1], head_dim=head_dim, dtype=dtype, **defaults | options)
