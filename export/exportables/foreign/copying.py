"""Copies of modules in memory that share their weights, or have them in another dtype, or none: the module itself stays as it is."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headfold.runtime.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def in_dtype(module: M, dtype: torch.dtype, device: str = "cpu") -> M:
    """A copy of a module whose parameters are of `dtype`; those that are already are not copied. Its buffers keep theirs.

    Raises:
        ConfigError: it cannot be copied.
    """
    return _copied(module, lambda x: x.to(device, dtype), lambda x: x.to(device, copy=True))


def sharing(module: M) -> M:
    """A copy with parameters of its own, whose numbers are the module's; its buffers are copied.

    Raises:
        ConfigError: it cannot be copied.
    """
    return _copied(module, lambda x: x.to("cpu"), lambda x: x.to("cpu", copy=True))


def without_weights(module: M, dtype: torch.dtype) -> M:
    """The same on meta tensors.

    Raises:
        ConfigError: it cannot be copied.
    """
    return _copied(module, lambda x: x.to("meta", dtype), lambda x: x.to("meta"))


def _copied(module: M, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]) -> M:
    known: dict[int, Any] = {id(x): nn.Parameter(parameter(x.detach()), False) for x in module.parameters()}
    known |= {id(x): buffer(x.detach()) for x in module.buffers()}
    try:
        return copy.deepcopy(module, known).eval()
    except Exception as error:  # whatever a module's own attributes raise
        raise ConfigError(
            f"cannot be copied: {type(error).__name__}: {error}",
            where=type(module).__name__,
            fix="Keep what is no weight, as open files, out of the module.",
        ) from error
