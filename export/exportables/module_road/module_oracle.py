"""A module as its own oracle: run eagerly, a sequence at a time, with attention written out here and not the op that is exported."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from headfold.export.exportables.oracle import Answer, Array, Past, QuantizedCache, Tokens, given_to, handed_on
from headfold.plugins.attention.schema import Attributes
from headfold.runtime.errors import ConfigError


class ModuleOracle:
    """See `Oracle`.

    Args:
        module: in the dtype to compute in.
        layers: the names of its layers' modules.
        head: that of its head's, where it has one.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], head: str | None = None) -> None:
        self._head = None if head is None else module.get_submodule(head)
        self.module, self._layers = module, [module.get_submodule(name) for name in layers]
        self.name = f"{type(module).__name__} itself, attention written out"

    @torch.inference_mode()
    def answer(
        self,
        tokens: Tokens,
        past: Past | None = None,
        given: Sequence[Array] | None = None,
        cache: QuantizedCache | None = None,
    ) -> Answer:
        """See Oracle."""
        assert cache is None
        start, attending = 0 if past is None else past.length, _Attending(past)
        positions = torch.arange(start, start + len(tokens))
        try:
            with handed_on(self._layers, given) as heard, given_to(self._head) as normed:
                logits = self.module(torch.from_numpy(tokens)[None], positions[None], attending)[0]
        except RuntimeError as error:  # of torch
            dtype = str(next(self.module.parameters()).dtype).removeprefix("torch.")
            raise ConfigError(
                f"does not run in {dtype}: {error}",
                where=type(self.module).__name__,
                fix="Let it follow the dtype of its parameters.",
            ) from error
        new = (attending.new[layer] for layer in range(len(self._layers)))
        return Answer.of(logits, heard, new, normed[0] if normed else None)


class _Attending:
    """The attention of one pass over one sequence; a `headfold.plugins.torch.Cache`. It keeps the new keys and values, [Hkv, S, D]."""

    def __init__(self, past: Past | None) -> None:
        self._past = past
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, sinks: Tensor | None
    ) -> Tensor:
        """Query by query, head by head, as `headfold.plugins.attention.reference` does it, but all at once: [1, Hq, S, D]."""
        a, q, k, v = attributes, query[0], key[0], value[0]
        self.new[layer] = k, v
        if self._past is not None:
            k, v = (torch.cat((old.to(x.dtype), x), 1) for old, x in zip(self._past.layers[layer], (k, v), strict=True))
        group = a.num_heads // a.kv_num_heads
        total, start = k.shape[1], k.shape[1] - q.shape[1]
        visible = torch.from_numpy(_visible(start, total, a.local_window_size))  # [S, T]
        outputs = []
        for head in range(a.num_heads):
            scores = (q[head] @ k[head // group].T * a.scale).to(torch.promote_types(q.dtype, torch.float32))  # [S, T]
            if a.softcap > 0:
                scores = a.softcap * torch.tanh(scores / a.softcap)
            scores = scores.masked_fill(~visible, -torch.inf)
            highest = scores.amax(1, keepdim=True)
            sink = (
                torch.full_like(highest, -torch.inf)
                if sinks is None
                else sinks[head].to(scores.dtype).expand_as(highest)
            )
            highest = torch.maximum(highest, sink)
            weights = torch.exp(scores - highest)
            weights = weights / (weights.sum(1, keepdim=True) + torch.exp(sink - highest))
            outputs.append(weights.to(v.dtype) @ v[head // group])
        return torch.stack(outputs)[None]


def _visible(start: int, total: int, window: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Which of `total` tokens each of those from `start` on sees."""
    distance = np.arange(start, total)[:, None] - np.arange(total)
    return (distance >= 0) & (distance < (window if window > 0 else total))
