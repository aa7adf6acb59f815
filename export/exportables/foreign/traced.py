"""What is traced of a decoder that headfold did not write: hooks find its layers and its head, one object does all its attention."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headfold.export.exportables.base import Master
from headfold.export.exportables.facts import LayerFacts
from headfold.export.exportables.foreign.mapped import MappedFiles
from headfold.export.model.decoder import Cache, Layout, rows_of, sequence_layout
from headfold.plugins.attention.schema import AttentionInputs, Attributes
from headfold.plugins.attention.torch_op import attention
from headfold.runtime.errors import ConfigError


class OnePass:
    """The attention of one forward pass; a `headfold.plugins.torch.Cache`.

    Without caches nothing is computed: it only learns how each layer attends, for `facts`.
    """

    def __init__(self, layout: Layout, past: Cache | None) -> None:
        self._layout, self._past = layout, past
        self.facts: dict[int, LayerFacts] = {}
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, sinks: Tensor | None
    ) -> Tensor:
        """[B, Hq, S, D] of new queries [B, Hq, S, D], keys and values [B, Hkv, S, D]."""
        if layer in self.facts:
            raise ConfigError(f"attends in layer {layer} again", fix="Each layer has keys and values of its own.")
        self.facts[layer] = LayerFacts(
            num_attention_heads=attributes.num_heads,
            num_key_value_heads=attributes.kv_num_heads,
            head_dim=query.shape[3],
            scale=attributes.scale,
            window=attributes.local_window_size,
            softcap=attributes.softcap,
            sinks=sinks is not None,
        )
        if self._past is None:
            return torch.empty_like(query)
        batch, heads, length, head_dim = query.shape
        q, k, v = (
            x.transpose(1, 2).reshape(batch, length, x.shape[1] * head_dim) for x in (query, key, value)
        )  # [B, S, H*D]
        keys, values = self._past[layer]
        inputs = AttentionInputs(
            query=q,
            key=k,
            value=v,
            past_key=keys,
            past_value=values,
            past_lengths=self._layout.past_lengths,
            total_sequence_length=self._layout.total,
            head_sink=sinks,
        )
        output, present = attention(inputs, attributes)
        assert present is not None
        self.present[layer] = present
        return output.view(batch, length, heads, head_dim).transpose(1, 2)


class TracedMaster(Master):
    """A decoder with the graph's inputs and outputs; see Master. Padding is moved to the end of each row.

    Args:
        decoder: the whole model.
        layers: of it, in order; what each returns is the residual stream [B, S, hidden], alone or first in a tuple.
        head: the module that makes logits; without one they are made of all tokens, and the wanted ones are taken.
        all_logits: make them of all tokens.
    """

    def __init__(
        self, decoder: nn.Module, layers: Iterable[nn.Module], head: nn.Module | None, all_logits: bool
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.all_logits, self.layers, self.headless = all_logits, list(layers), head is None
        self._wanted: Tensor | None = None
        self._every: Tensor | None = None  # the order of all tokens
        self._hidden: list[Tensor] = []
        self._given: list[Tensor] = []  # what the head was given of all tokens
        if head is not None:
            head.register_forward_pre_hook(self._take)
            head.register_forward_hook(self._give)
        for layer in self.layers:
            layer.register_forward_hook(self._keep)

    @abstractmethod
    def logits(self, input_ids: Tensor, positions: Tensor, cache: OnePass) -> Tensor:
        """Of the decoder, [B, S, vocab]; `positions` are [B, S]."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, caches: Cache | None
    ) -> tuple[Tensor, Cache, list[Tensor]]:
        """See Master."""
        if self.hidden_states and self.headless:
            raise ConfigError(
                "has no head of its own, so nobody knows its last hidden state", fix="Leave --hidden-states out."
            )
        logits, cache, hidden = self.run(input_ids, attention_mask, caches)
        hidden, self._given = [*hidden, *self._given], []
        present = [cache.present.get(layer) for layer in range(len(self.layers))]
        if None in present and torch.compiler.is_exporting():
            raise ConfigError(f"layer {present.index(None)} attends in another way while it is traced")
        return logits, [pair for pair in present if pair is not None], hidden

    def run(
        self, input_ids: Tensor, attention_mask: Tensor, caches: Cache | None
    ) -> tuple[Tensor, OnePass, list[Tensor]]:
        """One pass, and the attention it had; without caches only the facts are learned."""
        layout = sequence_layout(input_ids, attention_mask)
        length = input_ids.shape[1]
        ids = input_ids.gather(1, layout.real_first(length))
        positions = layout.past_lengths[:, None] + torch.arange(length, device=ids.device)  # [B, S]
        wanted = layout.wanted(length, not self.all_logits)
        self._wanted, self._hidden = wanted, []
        self._every = layout.wanted(length, False) if self.hidden_states else None
        cache = OnePass(layout, caches)
        logits = self.logits(ids, positions, cache)
        if self.headless:
            logits = logits.gather(1, wanted[:, :, None].expand(-1, -1, logits.shape[2]))
        hidden, self._hidden, self._wanted, self._every = self._hidden, [], None, None
        return logits, cache, hidden

    def _take(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Logits are computed of the wanted tokens only, [B * (1 or S), hidden]: two axes, so that a tied weight is not transposed."""
        x, wanted = inputs[0], self._wanted
        assert wanted is not None
        if self._every is not None:
            self._given = [rows_of(x, self._every)]
        return (rows_of(x, wanted).flatten(0, 1), *inputs[1:])

    def _give(self, _module: nn.Module, _inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        """[B, 1 or S, vocab] again."""
        wanted = self._wanted
        assert wanted is not None
        return logits.view(wanted.shape[0], wanted.shape[1], logits.shape[1])

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self._hidden.append(output if isinstance(output, Tensor) else output[0])


class ModelTensors:
    """The parameters and buffers of a module in memory; see Tensors. What is tied has its first name only."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.path = path
        self._tensors = {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}
        self._parameters = {name for name, _ in model.named_parameters()}
        self._files, self._last = MappedFiles(), ""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the parameters: the graph must use every one of them."""
        return {name: tuple(x.shape) for name, x in self._tensors.items() if name in self._parameters}

    def read(self, name: str) -> Tensor:
        """See Tensors; buffers too. The one that was read before it is taken to be done with."""
        if self._last:
            self._files.give_back(self._tensors[self._last])
        self._last = name
        return self._tensors[name]
