"""A model of any road with its weights, in float32: run whole, or layer by layer on streams that are kept between.

It is the module that is traced, on numbers. Weights of layers too large to stay are in memory only while their layer computes, and
so are embedding and head, where the module says that nobody else reads them.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headfold.export.exportables.base import Changed, Exportable, Tensors, first_names
from headfold.export.exportables.foreign.widening import is_large
from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.graph.weights import check_held
from headfold.export.model.decoder import Cache, Output
from headfold.export.model.hearing import hearing, linears, names_of
from headfold.export.publishing import one_line
from headfold.runtime.errors import BundleError


class _Reached(Exception):
    """No error: what is wanted has been computed."""

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


class Running:
    """See module; it is called as a `headfold.export.model.decoder.Decoder` is.

    Args:
        exportable: the model.
        tensors: its weights, opened; they may be others than the model's own.
        capacity: the most tokens of a sequence.
        dtypes: that must hold them, of weights for which float32 is not enough.
        room: makes a directory for what a large one should not have in memory; None: the system's.

    Raises:
        CheckpointError: a weight is not finite in float32 or such a dtype; of layers that come and go, when it first comes.
    """

    def __init__(
        self,
        exportable: Exportable,
        tensors: Tensors,
        capacity: int,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
        room: Callable[[], Path] | None = None,
    ) -> None:
        self.config, self.capacity = exportable.facts, capacity
        self._master = exportable.master(torch.float32, capacity, all_logits=True)
        self._tensors, self._tables = tensors, exportable.tables(torch.float32, capacity)
        self._layers, self._first = list(self._master.layers), first_names(self._master.decoder)
        self._prefixes = names_of(self._master.decoder, [*self._layers, *self._master.others])
        self._pieces = [self._master.decoder.get_submodule(prefix) for prefix in self._prefixes]  # that come and go
        self._others = dict[str, Tensor]()  # weights that are not the tensors'
        self._dtypes, self._held = dtypes, set[str]()  # the tensors that are known to be held
        # The pieces that are these, if any are; or one that is both
        self._embedding = self.count if self._master.others else None
        self._head = len(self._pieces) - 1 if self._master.others else None
        self._outputs = 0  # of a layer; 0: the stream alone
        self._room = room
        own = {id(x) for layer in self._layers for x in layer.parameters()}
        self.streams = is_large(sum(math.prod(x.shape) for x in self._master.decoder.parameters() if id(x) in own))
        self._holding: int | None = None  # a layer whose weights stay until its block ends
        self._resting: Collection[int] = ()  # pieces that compute nothing now
        self._load("")
        for layer in self._layers:
            layer.register_forward_hook(self._learn)
        for index, piece in enumerate(self._pieces if self.streams else ()):
            self._drop(index)
            piece.register_forward_pre_hook(lambda _, inputs, index=index: self._come(index, *inputs))
            piece.register_forward_hook(lambda _, inputs, __, index=index: self._go(index, *inputs))

    @property
    def count(self) -> int:
        """Of layers."""
        return len(self._layers)

    def layer_of(self, name: str) -> int | None:
        """The layer that a weight is in."""
        piece = self._piece_of(name)
        return piece if piece is not None and piece < self.count else None

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache:
        """An empty static cache of zeros."""
        shapes = [(2, batch, heads, capacity or self.capacity, size) for heads, size in self.config.cache_shapes]
        sizes = [math.prod(shape) for shape in shapes]
        parts = zip(torch.split(self.zeros(sum(sizes)), sizes), shapes, strict=True)
        return [(keys, values) for keys, values in (part.view(shape) for part, shape in parts)]

    def zeros(self, *shape: int) -> Tensor:
        """In float32; where layers come and go, in a file without a name, whose pages are memory only while nobody else asks for it.

        Raises:
            BundleError: the disk is full.
        """
        if not self.streams or 0 in shape:
            return torch.zeros(shape)
        room, size = self._room() if self._room is not None else Path(gettempdir()), 4 * math.prod(shape)
        with one_line(BundleError, room, f"Free {size >> 20:,} MiB there."), TemporaryFile(dir=room) as file:
            # Writing to a mapped page that the disk has no room for would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """See `Decoder.forward`; without a cache none comes back: layers of one shape have the same."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._master.all_logits = not last_only
        logits, present, hidden = self._master(input_ids, mask, cache or self._shared_cache(*input_ids.shape))
        return Output(logits, present if cache else [], hidden)

    def _shared_cache(self, batch: int, capacity: int) -> Cache:
        """For a pass without a past, whose layers need what they themselves write."""
        shapes = [(batch, heads, capacity, size) for heads, size in self.config.cache_shapes]
        shared = {shape: (torch.zeros(shape), torch.zeros(shape)) for shape in set(shapes)}
        return [shared[shape] for shape in shapes]

    @property
    def head(self) -> str | None:
        """The weight that makes the logits, [V, hidden]; the embedding, where it is tied to it. None where nobody knows it."""
        if self._master.headless:
            return None
        products = linears(dict(self._master.decoder.named_modules()))
        heads = [name for name in products if self.layer_of(name) is None]
        return self._first[heads[-1]] if heads else "model.embed_tokens.weight"

    def entering_head(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the head is given, [N, S, hidden], of each part of some tokens; each layer comes once."""
        streams = self._behind_layers(parts)
        self._master.hidden_states = True
        try:
            with self._held_piece(self._head):
                for part, stream in zip(parts, streams, strict=True):
                    with self._skipped(self.count, stream):
                        yield self(part, last_only=True).hidden_states[-1]
        finally:
            self._master.hidden_states = False

    def logits(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits [N, S, V] of each part of some tokens; layers that come and go come once."""
        if not self.streams:
            yield from (self(part).logits for part in parts)
            return
        yield from self.behind(parts, self._behind_layers(parts))

    def behind(self, parts: Sequence[Tensor], streams: Iterable[Tensor]) -> Iterator[Tensor]:
        """Logits [N, S, V] of each part of some tokens, where these leave the last layer; the head comes once."""
        with self._held_piece(self._head):
            for part, stream in zip(parts, streams, strict=True):
                yield self.run_from(self.count, part, stream)

    def _behind_layers(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What the last layer hands on."""
        streams = self.enter(parts)
        for index in range(self.count):
            with self.layer(index):
                streams = [self.run_layer(index, *pair) for pair in zip(parts, streams, strict=True)]
        return streams

    def enter(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What enters the first layer, [N, S, hidden], of each part of some tokens, int64 [N, S]; an embedding comes once, by rows."""
        with self._looked_up(parts):
            return [self._entering(self._layers[0], part) for part in parts]

    @contextmanager
    def _looked_up(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block an embedding that comes and goes, which may be large, is the rows of these tokens alone."""
        if self._embedding is None or not self.streams:
            yield
            return
        rows = torch.from_numpy(np.unique(np.concatenate([part.numpy().ravel() for part in parts])))
        piece, name = self._pieces[self._embedding], f"{self._prefixes[self._embedding]}.weight"
        gone = piece.get_parameter("weight")
        piece.register_parameter("weight", nn.Parameter(self._read_rows(name, rows), requires_grad=False))
        self._holding = self._embedding
        try:
            with hearing([(piece, lambda _, inputs: torch.searchsorted(rows, inputs[0]))]):
                yield
        finally:
            self._holding = None
            piece.register_parameter("weight", gone)

    def enter_module(self, module: nn.Module, index: int, tokens: Tensor, entering: Tensor) -> Tensor:
        """What enters one of a layer's modules, where this enters the layer."""
        with self._skipped(index, entering):
            return self._entering(module, tokens)

    def _entering(self, module: nn.Module, tokens: Tensor) -> Tensor:
        def reach(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Reached(inputs[0] if inputs else named["hidden_states"])

        return self._until(module.register_forward_pre_hook(reach, with_kwargs=True, prepend=True), tokens)

    def run_layer(self, index: int, tokens: Tensor, entering: Tensor) -> Tensor:
        """What a layer hands on, [N, S, hidden], where this enters it."""

        def reach(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        try:
            with self._skipped(index, entering):
                return self._until(self._layers[index].register_forward_hook(reach), tokens)
        finally:
            if self.streams:
                self._go(index)

    def _until(self, hook: RemovableHandle, tokens: Tensor) -> Tensor:
        """Run until a hook has reached what it hears, and remove it."""
        try:
            self(tokens)
        except _Reached as reached:
            return reached.stream
        finally:
            hook.remove()
        raise RuntimeError("a module did not run")

    def run_from(self, index: int, tokens: Tensor, entering: Tensor) -> Tensor:
        """Logits [N, S, V], where this enters the layer."""
        with self._skipped(index, entering):
            return self(tokens).logits

    @contextmanager
    def layer(self, index: int) -> Iterator[Mapping[str, nn.Module]]:
        """A layer's modules by the names that they have in the model; its weights stay in memory until the block ends."""
        prefix = self._prefixes[index]
        with self._held_piece(index):
            yield {f"{prefix}.{name}": module for name, module in self._layers[index].named_modules()}

    @contextmanager
    def _held_piece(self, index: int | None) -> Iterator[None]:
        """The weights of a piece, if there is one, stay in memory until the block ends."""
        if index is not None and self.streams:
            self._come(index)
        self._holding = index
        try:
            yield
        finally:
            self._holding = None
            if index is not None and self.streams:
                self._go(index)

    @contextmanager
    def replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block some weights are these."""
        kept = {name: self._others.get(name) for name in weights}
        for name, weight in weights.items():
            self.replace(name, weight)
        try:
            yield
        finally:
            for name, before in kept.items():
                self.replace(name, before)

    def replace(self, name: str, weight: Tensor | None) -> None:
        """A weight is this from now on; None: the model's own."""
        if weight is None:
            self._others.pop(name, None)
        else:
            self._others[name] = weight
        self._renew(name)

    @contextmanager
    def reading(self, weights: Changed) -> Iterator[None]:
        """Inside the block its weights are read here: those that come and go, each time they come."""
        before = self._tensors
        self._read_from(weights, weights.changed)
        try:
            yield
        finally:
            self._read_from(before, weights.changed)

    def _read_from(self, tensors: Tensors, changed: Collection[str]) -> None:
        self._tensors = tensors
        for name in changed:
            self._renew(name)

    def _renew(self, name: str) -> None:
        """Unless it will be read when it comes."""
        piece = self._piece_of(name)
        if not self.streams or piece is None or piece == self._holding:
            self._assign(name)

    def read(self, name: str) -> Tensor:
        """One of the weights as they are now, float32."""
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """The same in the dtype that it is stored in: a file's pages, not memory."""
        if name in self._others:
            return self._others[name]
        weight = self._tensors.read(name)
        if name not in self._held:
            check_held(
                weight,
                weight.to(self._dtypes.get(name, torch.float32)),
                where=self._tensors.path,
                name=name,
                if_nan="The checkpoint is damaged or training diverged: nothing of few bits stands for it.",
                if_large="Export with --dtype float32.",
            )
            self._held.add(name)
        return weight

    def _read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a weight [N, K], ascending, as they are now, float32."""
        if name in self._others or not isinstance(self._tensors, RoundedTensors):
            return self.stored(name)[rows].float()
        return self._tensors.read_rows(name, rows).float()

    @contextmanager
    def _skipped(self, index: int, entering: Tensor) -> Iterator[None]:
        """The layers before this one compute nothing, and this enters it."""
        handed = (entering, *[None] * (self._outputs - 1)) if self._outputs else entering
        # Nobody reads what enters a layer that is skipped, so an embedding rests, too
        self._resting = [*range(index), *([] if self._embedding is None else [self._embedding])]

        def resting(piece: int, result: Any, own: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *inputs, **named: result if self._rests(piece, *inputs) else own(*inputs, **named)

        for piece in self._resting:
            result = handed if piece < index else entering
            self._pieces[piece].forward = resting(piece, result, self._pieces[piece].forward)

        def give(
            _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((entering, *inputs[1:]), named) if inputs else (inputs, named | {"hidden_states": entering})

        # Behind an embedding a model may do more, which what enters its first layer has behind it
        hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in self._layers[index : index + 1]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for piece in self._resting:
                del self._pieces[piece].forward
            self._resting = ()

    def _learn(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs = len(output) if isinstance(output, tuple) else 0

    def _piece_of(self, name: str) -> int | None:
        """What that comes and goes a weight is in."""
        return next((i for i, prefix in enumerate(self._prefixes) if name.startswith(f"{prefix}.")), None)

    def _come(self, index: int, *inputs: Any) -> None:
        if index != self._holding and not self._rests(index, *inputs):
            self._load(f"{self._prefixes[index]}.")

    def _go(self, index: int, *inputs: Any) -> None:
        if index != self._holding and not self._rests(index, *inputs):
            self._drop(index)

    def _rests(self, index: int, *inputs: Any) -> bool:
        """It computes nothing now. An embedding that is the head, too, does where it is given what enters that, which is no ids."""
        return index in self._resting and not (index == self._embedding and inputs[0].is_floating_point())

    def _drop(self, index: int) -> None:
        for module in self._pieces[index].modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _load(self, prefix: str) -> None:
        """Parameters and buffers whose names begin so; what belongs to layers that come and go only with them."""
        decoder = self._master.decoder
        for name in [name for name, _ in decoder.named_parameters(remove_duplicate=False) if name.startswith(prefix)]:
            if prefix or not self.streams or self._piece_of(name) is None:
                self._assign(name)
        for name, buffer in list(decoder.named_buffers(remove_duplicate=False)) if not prefix else ():
            tensor = self._tables[name] if name in self._tables else self._tensors.read(name)
            parent, _, own = name.rpartition(".")
            decoder.get_submodule(parent)._buffers[own] = tensor.to(buffer.dtype)

    def _assign(self, name: str) -> None:
        first = self._first[name]
        parameter = nn.Parameter(self.read(first).contiguous(), requires_grad=False)
        for other in (other for other, known in self._first.items() if known == first):  # tied ones share it
            parent, _, own = other.rpartition(".")
            self._master.decoder.get_submodule(parent).register_parameter(own, parameter)
