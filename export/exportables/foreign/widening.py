"""A model in memory that computes in a wide dtype. A large one's layers have wide weights only while they compute.

So a model of mapped bfloat16 weights, or of few bits, needs no memory for a second, wide copy of itself.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headfold.export.exportables.base import Changed

M = TypeVar("M", bound=nn.Module)
LARGE = 3 << 29  # bytes, in float32


def is_large(numbers: int) -> bool:
    """Whether so many numbers in float32 are too many to be all in memory."""
    return 4 * numbers > LARGE


def widened(
    module: M,
    layers: Iterable[nn.Module],
    arithmetic: torch.dtype,
    stored: torch.dtype | None = None,
    weights: Changed | None = None,
) -> M:
    """The module, whose parameters it alone has, computing in `arithmetic`.

    Args:
        module: its buffers of floats are widened, too.
        layers: those of its modules that a large one widens one at a time.
        arithmetic: see above.
        stored: dtype that parameters are rounded to first; None for as they are.
        weights: what to compute with in place of its own parameters; what is changed in them is not rounded.
    """
    copy = arithmetic == torch.float64  # such weights are nudged, and a checkpoint of float64 keeps its own
    names = {id(x): name for name, x in reversed(list(module.named_parameters(remove_duplicate=False)))}

    def wide(parameter: nn.Parameter, own: Tensor) -> Tensor:
        name = names[id(parameter)]
        if weights is not None and name in weights.changed:
            return weights.read(name).to(arithmetic, copy=copy)
        x = own if weights is None else weights.read(name)
        return (x if stored is None else x.to(stored)).to(arithmetic, copy=copy)

    parameters = list(module.parameters())
    apart = [list(layer.parameters()) for layer in layers] if is_large(sum(x.numel() for x in parameters)) else []
    inside = {id(x) for part in apart for x in part}
    for parameter in parameters:
        if id(parameter) not in inside:
            parameter.data = wide(parameter, parameter.data)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(arithmetic)
    for layer, part in zip(layers, apart, strict=False):
        kept = [parameter.data for parameter in part]

        def come(*_: Any, part: list[nn.Parameter] = part, kept: list[Tensor] = kept) -> None:
            for parameter, own in zip(part, kept, strict=True):
                parameter.data = wide(parameter, own)

        def go(*_: Any, part: list[nn.Parameter] = part, kept: list[Tensor] = kept) -> None:
            for parameter, own in zip(part, kept, strict=True):
                parameter.data = own

        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(go)
    return module
