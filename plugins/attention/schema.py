"""The operator headfold::GroupedQueryAttention: its names, in order, and their meaning.

Every body and kernel obeys this file. Shapes: B batch, S new tokens, C cache capacity, Hq/Hkv query/key-value heads,
D head size, R rotated dimensions (R <= D, even).
The caches are updated in place: `present_*` aliases `past_*` wherever the backend can alias.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Literal, TypeVar

DOMAIN = "headfold"  # never com.microsoft: a kernel of that name, of today's or a later release, would win over ours
OP_TYPE = "GroupedQueryAttention"
VERSION = 1
OUTPUTS = ("output", "present_key", "present_value")  # [B, S, Hq*D], [B, Hkv, C, D], [B, Hkv, C, D]

Attention = Literal["native", "plugin"]  # in TensorRT: its own layers, or ours
T = TypeVar("T")  # an array, a tensor, a value of a graph, an address


@dataclass(frozen=True, kw_only=True)
class AttentionInputs(Generic[T]):
    """The operator's inputs, in the order of an ONNX node's; one that is None is left empty there."""

    # [B, S, Hq*D]. Packed, in ONNX graphs only: with neither key nor value, and no q/k norms, it is all three, end to end in this
    # order, [B, S, (Hq + 2 Hkv)*D]: as ONNX Runtime's kernel takes them. A Split takes 2% of SmolLM2's time per token in int4.
    query: T
    key: T | None = None  # [B, S, Hkv*D] of the new tokens, before the op's RoPE
    value: T | None = None  # [B, S, Hkv*D]
    past_key: (
        T | None
    )  # [B, Hkv, C, D], rotated; rows at and after past_lengths are undefined; int8 or float8_e4m3fn if quantized
    past_value: (
        T | None
    )  # [B, Hkv, C, D]; without caches (training, scoring; PyTorch only) the new tokens are all there is
    past_lengths: T  # int64 [B]: tokens already in each sequence's cache; the new ones go right behind them
    total_sequence_length: T | int  # int32 [], on the host: bound of past_lengths + S; S itself for a first prompt
    # Without tables the op rotates nothing: the model does so before it, or has no RoPE
    cos_cache: T | None = None  # [>= C, R/2]: row p holds the cosines of position p
    sin_cache: T | None = None  # [>= C, R/2]
    # RMSNorm over D of every head, before RoPE (Qwen3), [D] each
    q_norm_weight: T | None = None
    k_norm_weight: T | None = None
    # In ONNX graphs only: int32 [B], past_lengths + S - 1. It says nothing new, but ONNX Runtime's kernel wants it, and it is
    # the same in all layers: computed in each of them, it takes 8% of SmolLM2's time per token.
    last_index: T | None = None
    # Of a quantized cache, float32 [Hkv] each: what is stored stands for `stored * scale`. A new token is divided by the scale, held to
    # the range of the cache's dtype, rounded to the nearest (half to even), and attended to as it is stored.
    key_scale: T | None = None
    value_scale: T | None = None
    # Attention sinks (gpt-oss; Xiao et al. 2024, section 3), [Hq]: a logit per query head that only the softmax sees
    head_sink: T | None = None

    @classmethod
    def of_node(cls, values: Sequence[T | None]) -> "AttentionInputs[T]":
        """Take a node's inputs apart."""
        return cls(**dict(zip(ALL_INPUTS, values, strict=False)))  # type: ignore[arg-type]

    def given(self) -> dict[str, T]:
        """Those that are there, by name."""
        return {name: value for name in ALL_INPUTS if (value := getattr(self, name)) is not None}

    @property
    def packed(self) -> bool:
        """Whether `query` is queries, keys and values."""
        return self.key is None and self.value is None

    @property
    def tables(self) -> tuple[T, T] | None:
        """Cosines and sines; None if the op rotates nothing."""
        return _both(self.cos_cache, self.sin_cache)

    @property
    def norms(self) -> tuple[T, T] | None:
        """The norms of queries and keys; None if there are none."""
        return _both(self.q_norm_weight, self.k_norm_weight)

    @property
    def scales(self) -> tuple[T, T] | None:
        """The scales of a quantized cache; None if it is not quantized."""
        return _both(self.key_scale, self.value_scale)


def _both(first: T | None, second: T | None) -> tuple[T, T] | None:
    return (first, second) if first is not None and second is not None else None


ALL_INPUTS = tuple(field.name for field in fields(AttentionInputs))
TABLES, NORMS = ("cos_cache", "sin_cache"), ("q_norm_weight", "k_norm_weight")
LAST_INDEX, SCALES, SINK = "last_index", ("key_scale", "value_scale"), "head_sink"
INPUTS = ALL_INPUTS[: ALL_INPUTS.index(TABLES[-1]) + 1]  # of an op that rotates; those behind them are always optional


@dataclass(frozen=True)
class Attributes:
    """The operator's attributes, with the field's standard names."""

    num_heads: int
    kv_num_heads: int
    scale: float
    local_window_size: int = -1  # a token sees itself and the local_window_size - 1 tokens before it; -1: all of them
    softcap: float = 0.0  # scores become softcap * tanh(scores / softcap); 0: off
    rotary_interleaved: int = 0  # 0: dimension i pairs with i + R/2 (Hugging Face); 1: 2i pairs with 2i + 1
    qk_norm_epsilon: float = 1e-6
