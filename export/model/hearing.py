"""A model's modules while it runs: what they are called, which of them are products, and what enters them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def linears(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Those of some modules that are products, by the names of their weights."""
    return {f"{name}.weight": module for name, module in modules.items() if isinstance(module, nn.Linear)}


@contextmanager
def hearing(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block each hook is told what enters its module, before that computes; what it returns enters instead, if anything."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def names_of(decoder: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    """What a decoder calls some of its modules."""
    names = {id(module): name for name, module in decoder.named_modules()}
    return [names[id(module)] for module in modules]
