"""The operator headfold::GroupedQueryAttention: its names, in order, and their meaning.

Every body and kernel obeys this file. Shapes: B batch, S new tokens, C cache capacity, Hq/Hkv query/key-value heads,
D head size, R rotated dimensions (R <= D, even).
The caches are updated in place: `present_*` aliases `past_*` wherever the backend can alias.
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "headfold"  # never com.microsoft: a kernel of that name, of today's or a later release, would win over ours
OP_TYPE = "GroupedQueryAttention"
VERSION = 1

INPUTS = (
    "query",  # [B, S, Hq*D]
    "key",  # [B, S, Hkv*D] of the new tokens, before RoPE
    "value",  # [B, S, Hkv*D]
    "past_key",  # [B, Hkv, C, D], rotated; rows at and after past_lengths are undefined; int8 or float8_e4m3fn if quantized
    "past_value",  # [B, Hkv, C, D]
    "past_lengths",  # int64 [B]: tokens already in each sequence's cache; the new ones go right behind them
    "total_sequence_length",  # int32 [], on the host: bound of past_lengths + S; S itself for a first prompt
    "cos_cache",  # [>= C, R/2]: row p holds the cosines of position p
    "sin_cache",  # [>= C, R/2]
)
OPTIONAL_INPUTS = ("q_norm_weight", "k_norm_weight")  # [D] each: RMSNorm over D of every head, before RoPE (Qwen3)
# Of a quantized cache, float32 [Hkv] each: what is stored stands for `stored * scale`. A new token is divided by the scale, held to the
# range of the cache's dtype, rounded to the nearest (half to even), and attended to as it is stored.
SCALES = ("key_scale", "value_scale")
Quantized = Literal["int8", "float8_e4m3fn"]  # dtypes of a quantized cache
# One more input, in ONNX graphs only: int32 [B], past_lengths + S - 1. It says nothing new, but ONNX Runtime's kernel wants it,
# and it is the same in all layers: computed in each of them, it takes 8% of SmolLM2's time per token.
LAST_INDEX = "last_index"
OUTPUTS = ("output", "present_key", "present_value")  # [B, S, Hq*D], [B, Hkv, C, D], [B, Hkv, C, D]


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
