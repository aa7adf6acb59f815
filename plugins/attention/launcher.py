"""What the TensorRT plugin asks of whatever launches the attention kernels: device addresses, sizes, and one call.

`cuda_launch.Kernels` is one; tests pass fakes. Plain data: nothing here needs CUDA. Shapes are those of
`headfold.plugins.attention.schema`.
"""

from dataclasses import dataclass
from typing import Protocol

from headfold.plugins.attention.kernel_contract import KernelSpec


@dataclass(frozen=True)
class Pointers:
    """Device addresses; 0 is null. `present_*` are the caches, appended to in place: they hold the past already."""

    query: int
    key: int
    value: int
    present_key: int
    present_value: int
    past_lengths: int  # int64 [B], on the device
    cos_cache: int
    sin_cache: int
    output: int
    q_norm_weight: int = 0
    k_norm_weight: int = 0
    key_scale: int = 0  # of a quantized cache
    value_scale: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of one launch: B, S and C."""

    batch: int
    new_tokens: int
    capacity: int


class Launcher(Protocol):
    """Puts append and attention on a stream: no allocation, no synchronisation, so that a CUDA graph can capture it."""

    @property
    def spec(self) -> KernelSpec:
        """What its kernels are compiled for."""
        ...

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
        """Launch; `workspace` is the address of `workspace_bytes(spec, B, S, C)` bytes, `stream` a CUstream's."""
        ...
