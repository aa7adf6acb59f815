"""Modules of a person's own: a plain one to spoil, and one that has what decoders may have besides."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headfold.plugins.torch import attention


class Attending(nn.Module):
    """Two heads of 16 that share one key and one value."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor, cache: Any, layer: int) -> Tensor:
        q, (k, v) = heads(self.q(x)), heads(self.kv(x)).split(1, 1)
        return self.o(joined(self.attend(q, k, v, cache, layer)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int) -> Tensor:
        return attention(q, k, v, cache, layer)


def heads(x: Tensor, size: int = 16) -> Tensor:
    """[B, S, H*D] to [B, H, S, D]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, attending: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.attending, self.up, self.down = attending, nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor, cache: Any, layer: int) -> Tensor:
        x = x + self.attending(x, cache, layer)
        return x + self.down(F.silu(self.up(x)))


class Plain(nn.Module):
    """Two layers, a table of positions."""

    def __init__(self, attending: type[nn.Module] = Attending, width: int = 32, vocabulary: int = 60) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(attending()) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        x = self.embedding(input_ids) + self.positions(positions)
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number)
        return self.head(x)


class OddLayer(nn.Module):
    """Three heads of 24, one key and value; a window, a soft cap and sinks; hands on a tuple."""

    def __init__(self, number: int, width: int = 48) -> None:
        super().__init__()
        self.number, self.window, self.softcap = number, (5, None, 9)[number], (0.0, 20.0, 0.0)[number]
        self.norm, self.qkv, self.o = nn.LayerNorm(width), nn.Linear(width, 5 * 24), nn.Linear(72, width)
        self.sinks = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        q, k, v = heads(self.qkv(self.norm(x)), 24).split((3, 1, 1), 1)
        given = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks, "scale": 0.3}
        return x + self.o(joined(attention(q, k, v, cache, self.number, **given))), None


class Odd(nn.Module):
    """A parameter as table of positions, the embedding as head, a soft cap on logits, the first stream again in every layer."""

    def __init__(self, width: int = 48, vocabulary: int = 257) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.3 * torch.randn(64, width))
        self.blocks, self.norm = nn.ModuleList(OddLayer(number) for number in range(3)), nn.LayerNorm(width)
        self.register_buffer("bias", torch.randn(vocabulary))

    def forward(self, input_ids: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        x = first = self.embedding(input_ids) + self.positions[positions]
        for block in self.blocks:
            x, _ = block(x + 0.1 * first, cache)
        return 30 * torch.tanh(F.linear(self.norm(x), self.embedding.weight) / 30) + self.bias.to(x.dtype)
