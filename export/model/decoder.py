"""The decoder in PyTorch, from its configuration alone. One definition serves training, the parity oracle and the ONNX export.

Parameter names are Hugging Face's Llama names, so a state dict goes in and out unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headfold.export.model.config import Activation, ModelConfig
from headfold.export.model.rope import rope_tables
from headfold.plugins.attention.schema import AttentionInputs, Attributes
from headfold.plugins.attention.torch_op import attention, rms_norm

Scales = tuple[Tensor, Tensor]  # of a layer's quantized keys and values, float32 [Hkv] each
Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, [B, Hkv, C, D] each


@dataclass
class Layout:
    """Where the new tokens of a padded batch belong. Padding may be on either side of each row's new tokens."""

    past_lengths: Tensor  # int64 [B]: real tokens before these
    new_lengths: Tensor  # int64 [B]: real tokens among these
    leading: Tensor  # int64 [B]: padding before the first real one
    total: int  # width of the attention mask

    def real_first(self, length: int) -> Tensor:
        """For each of a row's `length` places, which token comes there when its leading padding moves to the end: int64 [B, S]."""
        shifted = torch.arange(length, device=self.leading.device) + self.leading[:, None]
        return torch.where(shifted < length, shifted, shifted - length)

    def wanted(self, length: int, last_only: bool) -> Tensor:
        """The inverse of `real_first`, or with `last_only` the place of each row's last real token, [B, 1]."""
        if last_only:
            return (self.new_lengths - 1).clamp(min=0)[:, None]
        shifted = torch.arange(length, device=self.leading.device) - self.leading[:, None]
        return torch.where(shifted >= 0, shifted, shifted + length)


def sequence_layout(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """Read the layout off a mask [B, T] whose last S columns belong to `input_ids` [B, S]; 1 is a token, 0 padding."""
    total, new = attention_mask.shape[1], input_ids.shape[1]
    is_new = (torch.arange(total, device=input_ids.device) >= total - new).to(attention_mask.dtype)  # [T]
    new_mask = attention_mask * is_new  # [B, T]
    past_lengths = (attention_mask - new_mask).sum(1)
    leading = (new_mask.argmax(1) - (total - new)).clamp(min=0)
    return Layout(past_lengths, new_mask.sum(1), leading, total)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the hidden size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.is_rms = config.norm_eps, config.norm == "rms_norm"
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] to the same."""
        if not self.is_rms:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections around the grouped-attention op."""

    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.attributes = Attributes(
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
            local_window_size=config.window(layer),
            qk_norm_epsilon=config.norm_eps,
        )
        self.register_buffer("key_scale", None)  # of a quantized cache, float32 [Hkv] each
        self.register_buffer("value_scale", None)

    def forward(
        self, x: Tensor, layout: Layout, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """[B, S, hidden] to the same, and the layer's cache with the new tokens in it."""
        keys, values = past if past is not None else (None, None)
        inputs = AttentionInputs(
            query=self.q_proj(x),
            key=self.k_proj(x),
            value=self.v_proj(x),
            past_key=keys,
            past_value=values,
            past_lengths=layout.past_lengths,
            total_sequence_length=layout.total,
            cos_cache=rope[0],
            sin_cache=rope[1],
            q_norm_weight=self.q_norm.weight if self.q_norm is not None else None,
            k_norm_weight=self.k_norm.weight if self.k_norm is not None else None,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
        )
        output, present = attention(inputs, self.attributes)
        return self.o_proj(output), present


class HeadNorm(nn.Module):
    """Holds the weight of a per-head RMSNorm; the attention op applies it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class FeedForward(nn.Module):
    """All eight variants of Shazeer 2020: `act(x W) W2`, or gated, `(act(x W) * x V) W2` (equations 1 to 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] to the same."""
        up = self.up_proj(x)  # [B, S, inner]
        inner = activate(self.act, self.gate_proj(x)) * up if self.gate_proj is not None else activate(self.act, up)
        return cast(Tensor, self.down_proj(inner))


def activate(name: Activation, x: Tensor) -> Tensor:
    """The activation, elementwise."""
    match name:
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_pytorch_tanh":
            return F.gelu(x, approximate="tanh")
        case "sigmoid":
            return torch.sigmoid(x)
        case "linear":
            return x


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(config), Norm(config)
        self.self_attn, self.mlp = Attention(config, index), FeedForward(config)

    def forward(
        self, x: Tensor, layout: Layout, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """[B, S, hidden] to the same, and the layer's cache."""
        attention, present = self.self_attn(self.input_layernorm(x), layout, rope, past)
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Embedding(nn.Embedding):
    """It is the head, too, where that is tied to it: given what enters the head it makes logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., hidden] of ids [...], or logits [..., V] of floats [..., hidden]."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Stack(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config)


@dataclass
class Output:
    """What a forward pass computes. Behind a row's last token, hidden states and caches are undefined."""

    logits: Tensor  # [B, S, V], or [B, 1, V] of each row's last real token
    cache: Cache  # the caches passed in, updated in place (in an export: new values)
    hidden_states: list[Tensor]  # residual stream after each layer, [B, S, hidden], leading padding moved to the end
    normed: Tensor | None = None  # that after the final norm, in the order of input_ids, if asked for


class Decoder(nn.Module):
    """The whole language model. `capacity` is the number of positions its rotary tables cover."""

    cos_cache: Tensor  # [capacity, R/2]
    sin_cache: Tensor

    def __init__(self, config: ModelConfig, capacity: int | None = None) -> None:
        super().__init__()
        self.config, self.capacity = config, capacity or config.max_position_embeddings
        self.model = Stack(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        with torch.device("cpu"):  # real values even where the weights are only meta tensors
            cos, sin = rope_tables(config, self.capacity)
        self.register_buffer("cos_cache", cos, persistent=False)
        self.register_buffer("sin_cache", sin, persistent=False)
        self.cache_dtype: torch.dtype | None = None  # of a quantized cache; None: that of the weights

    def quantize_cache(self, dtype: torch.dtype, scales: Sequence[Scales]) -> None:
        """Keep keys and values in int8 or float8_e4m3fn from now on; `scales` are those of each layer's heads, float32 [Hkv] each."""
        self.cache_dtype = dtype
        for layer, (key_scale, value_scale) in zip(self.model.layers, scales, strict=True):
            attention = cast(Layer, layer).self_attn
            attention.register_buffer("key_scale", key_scale, persistent=False)
            attention.register_buffer("value_scale", value_scale, persistent=False)

    def keep_cache(self) -> None:
        """Keep keys and values in the dtype of the weights, as a new decoder does."""
        self.cache_dtype = None
        for layer in self.model.layers:
            attention = cast(Layer, layer).self_attn
            attention.key_scale = attention.value_scale = None

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache:
        """An empty static cache of zeros, in the dtype of the weights or quantized."""
        return [self.new_layer_cache(batch, capacity) for _ in range(self.config.num_hidden_layers)]

    def new_layer_cache(self, batch: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """That of one layer, whichever."""
        c, weight = self.config, self.model.norm.weight  # others may be narrower while they do not compute
        shape, dtype = (batch, c.num_key_value_heads, capacity or self.capacity, c.head_dim), self.cache_dtype
        keys, values = (torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device) for _ in range(2))
        return keys, values

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        normed: bool = False,
    ) -> Output:
        """Next-token logits.

        Args:
            input_ids: int64 [B, S], the new tokens.
            attention_mask: int64 [B, T] over the past and the new tokens, 1 for tokens, 0 for padding, either side; default ones.
            cache: from `new_cache`, with the past in it; None for no past. Updated in place.
            last_only: compute logits for each row's last real token only.
            normed: also give what the head is given, of all tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        layout = sequence_layout(input_ids, attention_mask)
        if cache is None and self.cache_dtype is not None:  # tokens are attended to as they are stored
            cache = self.new_cache(*input_ids.shape)
        length = input_ids.shape[1]
        x = self.model.embed_tokens(input_ids.gather(1, layout.real_first(length)))  # [B, S, hidden]
        rope = (self.cos_cache.to(x.dtype), self.sin_cache.to(x.dtype))
        present: Cache = []
        hidden_states: list[Tensor] = []
        for index, layer in enumerate(self.model.layers):
            x, kv = layer(x, layout, rope, cache[index] if cache is not None else None)
            hidden_states.append(x)
            if kv is not None:
                present.append(kv)
        every: Tensor | None = None
        if normed:
            x = self.model.norm(x)
            every = rows_of(x, layout.wanted(length, False))
        x = rows_of(x, layout.wanted(length, last_only))  # [B, 1 or S, hidden], back in the order of input_ids
        x = x if normed else self.model.norm(x)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits = head(x.flatten(0, 1)).view(x.shape[0], x.shape[1], self.config.vocab_size)
        return Output(logits, present, hidden_states, every)


def rows_of(x: Tensor, wanted: Tensor) -> Tensor:
    """Of [B, S, hidden] the tokens `wanted` [B, n] of each row."""
    return x.gather(1, wanted[:, :, None].expand(-1, -1, x.shape[2]))
