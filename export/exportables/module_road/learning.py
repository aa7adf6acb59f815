"""What a module is, learned from a pass on meta tensors: its layers, its head, how each layer attends. What it does is what counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headfold.export.exportables.facts import LayerFacts
from headfold.export.exportables.foreign.traced import OnePass
from headfold.export.model.decoder import sequence_layout
from headfold.plugins.attention.schema import Attributes
from headfold.runtime.errors import ConfigError, HeadfoldError

_OP = "headfold.plugins.torch.attention(q, k, v, cache, layer)"
_FORWARD = "headfold calls forward(input_ids, positions, cache), and takes logits [batch, tokens, vocabulary]."
_REGISTER = "Register it: self.register_buffer(name, tensor)."
# Of the pass: one that is no size of a parameter tells tokens from features.
_LENGTHS = (31, 37, 41, 43, 47, 53, 59, 61)
_ATTENDING = "scaled_dot_product", "multi_head_attention"
_PRODUCTS = "mm", "bmm", "addmm", "baddbmm", "matmul", "softmax", "_softmax", "_safe_softmax"


@dataclass(frozen=True)
class Learned:
    """What one pass tells of a module."""

    layers: tuple[LayerFacts, ...]
    names: tuple[str, ...]  # of the layers' modules
    head: str | None  # the module that makes the logits; None: no nn.Linear of its own
    vocab_size: int
    hidden_size: int


@dataclass
class _Heard:
    """The modules that run, outermost first; and what those that ended gave."""

    stack: list[str] = field(default_factory=list)
    ended: list[tuple[str, nn.Module, Any]] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The innermost."""
        return self.stack[-1] if self.stack else ""


class _Listening(OnePass):
    """Also remembers which modules attended."""

    def __init__(self, heard: _Heard, ids: Tensor) -> None:
        super().__init__(sequence_layout(ids, torch.ones_like(ids)), None)
        self._heard = heard
        self.stacks: dict[int, tuple[str, ...]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, sinks: Tensor | None
    ) -> Tensor:
        """See OnePass."""
        output = super().attend(layer, query, key, value, attributes, sinks)
        self.stacks[layer] = tuple(self._heard.stack)
        return output


class _NoOtherAttention(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what multiplies tokens with tokens, [.., S, S]: attention that is not the op's, and so would have no cache."""

    def __init__(self, heard: _Heard, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heard, self._length = heard, length

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        square = isinstance(output, Tensor) and output.shape[-2:] == (self._length, self._length)
        if any(part in name for part in _ATTENDING) or (name in _PRODUCTS and square):
            raise ConfigError(f"attends without headfold's op ({name})", where=self._heard.where, fix=f"Call {_OP}.")
        return output


class _NoNumbers(TorchFunctionMode):
    """Refuses tensors of numbers that the module's code has: they are neither weights nor computed."""

    def __init__(self, heard: _Heard) -> None:
        super().__init__()
        self._heard = heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise ConfigError("makes a tensor of numbers while it runs", where=self._heard.where, fix=_REGISTER)
        return func(*args, **(kwargs or {}))


def learn(module: nn.Module) -> Learned:
    """Learn it of a module on meta tensors.

    Raises:
        ConfigError: it is no decoder that can be exported; which submodule, and why, is named.
    """
    heard = _Heard()
    sizes = {size for parameter in module.parameters() for size in parameter.shape}
    length = next(length for length in (*_LENGTHS, max(sizes, default=0) + 1) if length not in sizes)
    with torch.device("meta"), torch.no_grad(), _hearing(module, heard):
        ids = torch.zeros(1, length, dtype=torch.long)
        positions = torch.arange(length)[None]
        cache = _Listening(heard, ids)
        try:
            with _NoOtherAttention(heard, length), _NoNumbers(heard):
                logits = module(ids, positions, cache)
        except HeadfoldError as error:
            raise ConfigError(error.what, where=error.where or heard.where, fix=error.fix) from error
        except Exception as error:  # whatever a module's own code raises
            raise _refused(heard, error) from error
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, length):
        kind = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"of 1 x {length} tokens it makes {kind}", fix=_FORWARD)
    count = len(cache.facts)
    if count == 0:
        raise ConfigError("never attends through headfold's op", fix=f"Call {_OP}.")
    if set(cache.facts) != set(range(count)):
        raise ConfigError(f"attends in layers {sorted(cache.facts)}", fix="Layers are numbers from 0 on, without gaps.")
    names = _layers([cache.stacks[layer] for layer in range(count)])
    return Learned(
        layers=tuple(cache.facts[layer] for layer in range(count)),
        names=names,
        head=_head(heard, names, logits),
        vocab_size=logits.shape[2],
        hidden_size=_hidden_size(heard, names, length),
    )


@contextmanager
def _hearing(module: nn.Module, heard: _Heard) -> Iterator[None]:
    """Keeps `heard` while the module runs; after an error its stack stays where that was."""

    def enter(name: str) -> Any:
        return lambda _module, _inputs: heard.stack.append(name)

    def leave(name: str) -> Any:
        def hook(inner: nn.Module, _inputs: Any, output: Any) -> None:
            heard.stack.pop()
            heard.ended.append((name, inner, output))

        return hook

    handles = []
    for name, inner in module.named_modules():
        handles += [inner.register_forward_pre_hook(enter(name)), inner.register_forward_hook(leave(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refused(heard: _Heard, error: Exception) -> ConfigError:
    """In one line, why it does not run."""
    text = " ".join(str(error).split())
    if not heard.stack or (isinstance(error, TypeError) and len(heard.stack) == 1 and "forward()" in text):
        return ConfigError(f"does not run: {text}", fix=_FORWARD)
    if "meta" in text and any(part in text for part in ("_local_scalar_dense", "item()", "nonzero", "is_nonzero")):
        return ConfigError(
            "decides by values that it computes, so it is no one graph",
            where=heard.where,
            fix="Use torch.where in place of `if`, `item()` and masks that select.",
        )
    if "meta" in text and "device" in text:
        return ConfigError(
            f"has tensors that are neither parameters nor buffers: {text}",
            where=heard.where,
            fix=_REGISTER,
        )
    return ConfigError(
        f"does not run: {text}",
        where=heard.where,
        fix="It runs in the bundle's dtype (parameters; buffers keep theirs) and with any number of tokens.",
    )


def _layers(stacks: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The module of each layer: the elements of one list, attention i in element i."""
    for name in stacks[0]:
        if name.rpartition(".")[2] == "0":
            names = tuple(f"{name[:-1]}{layer}" for layer in range(len(stacks)))
            if all(name in stack for name, stack in zip(names, stacks, strict=True)):
                return names
    raise ConfigError(
        f"attends {len(stacks)} times, but not once in each module of one list, in its order",
        where=stacks[0][-1],
        fix="Put its layers into one nn.ModuleList: headfold proves them one by one.",
    )


def _hidden_size(heard: _Heard, names: tuple[str, ...], length: int) -> int:
    """Of the residual stream, which every layer hands on."""
    sizes = set()
    for name, _, output in heard.ended:
        if name in names:
            x = output[0] if isinstance(output, tuple) else output
            if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != (1, length):
                raise ConfigError(
                    "does not return the residual stream [batch, tokens, hidden]",
                    where=name,
                    fix="A layer returns it alone, or first in a tuple.",
                )
            sizes.add(x.shape[2])
    if len(sizes) != 1:
        raise ConfigError(f"its layers return streams of sizes {sorted(sizes)}", fix="headfold wants one.")
    return int(sizes.pop())


def _head(heard: _Heard, names: tuple[str, ...], logits: Tensor) -> str | None:
    """The last nn.Linear that ran, where it made what logits are made of; another one computes logits of every token."""
    ran = [(name, module, output) for name, module, output in heard.ended if isinstance(module, nn.Linear)]
    name, _, output = ran[-1] if ran else ("", None, None)
    inside = any(name.startswith(f"{layer}.") for layer in names)
    return name if isinstance(output, Tensor) and output.shape == logits.shape and not inside else None
