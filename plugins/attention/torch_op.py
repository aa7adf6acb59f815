"""headfold::GroupedQueryAttention in torch: differentiable eager maths, and the registered op that an export traces.

Shapes are those of `headfold.plugins.attention.schema`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.plugins.attention.schema import ALL_INPUTS, LAST_INDEX, AttentionInputs, Attributes
from headfold.plugins.dtypes import QUANTIZED


def attend(inputs: AttentionInputs[Tensor], attributes: Attributes) -> Tensor:
    """Attend causally over the cache and the new tokens, writing the new keys and values **into** the caches.

    Args:
        inputs: see there; `total_sequence_length` is a number, at least max(past_lengths) + S: no more cache positions are looked at.
            The caller makes sure that past_lengths + S <= C: a torch scatter checks it. Without caches `past_lengths` must be zeros.
        attributes: heads, scale, window, soft cap, RoPE pairing.

    Returns:
        [B, S, Hq*D] in the dtype of `query`.
    """
    a, x = attributes, inputs
    assert x.key is not None
    assert x.value is not None
    batch, length, _ = x.query.shape
    head_dim = x.query.shape[-1] // a.num_heads
    q = x.query.view(batch, length, a.num_heads, head_dim).transpose(1, 2)  # [B, Hq, S, D]
    k = x.key.view(batch, length, a.kv_num_heads, head_dim).transpose(1, 2)  # [B, Hkv, S, D]
    v = x.value.view(batch, length, a.kv_num_heads, head_dim).transpose(1, 2)  # [B, Hkv, S, D]
    if x.norms is not None:
        q, k = (rms_norm(heads, weight, a.qk_norm_epsilon) for heads, weight in zip((q, k), x.norms, strict=True))

    positions = x.past_lengths[:, None] + torch.arange(length, device=q.device)  # [B, S]
    if x.tables is not None:
        cos, sin = (table[positions][:, None] for table in x.tables)  # [B, 1, S, R/2]
        q, k = rotate(q, cos, sin, bool(a.rotary_interleaved)), rotate(k, cos, sin, bool(a.rotary_interleaved))
    if x.past_key is not None and x.past_value is not None:
        k, v = _append(x, (x.past_key, x.past_value), (k, v), positions)  # [B, Hkv, T, D]

    distance = positions[:, None, :, None] - torch.arange(k.shape[2], device=q.device)  # [B, 1, S, T]
    visible = distance >= 0
    if a.local_window_size > 0:
        visible &= distance < a.local_window_size
    if a.softcap > 0 or x.head_sink is not None:
        groups = a.num_heads // a.kv_num_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        wide = torch.promote_types(q.dtype, torch.float32)  # float16 ends at 65,504
        scores = q.to(wide) * a.scale @ k.to(wide).transpose(2, 3)  # [B, Hq, S, T]
        if a.softcap > 0:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if x.head_sink is not None:
            scores = torch.cat((scores, x.head_sink.to(wide)[:, None, None].expand(batch, -1, length, 1)), -1)
        output = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
    else:
        gqa = a.num_heads != a.kv_num_heads
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=a.scale, enable_gqa=gqa)
    return output.transpose(1, 2).reshape(batch, length, a.num_heads * head_dim)


def _append(
    x: AttentionInputs[Tensor], caches: tuple[Tensor, Tensor], news: tuple[Tensor, Tensor], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Write new keys and values [B, Hkv, S, D] into the caches; what attention reads of them, [B, Hkv, T, D]."""
    total = cast(int, x.total_sequence_length)
    index = positions[:, None, :, None].expand(news[0].shape)
    written = (positions[:, -1:] >= torch.arange(total, device=index.device))[:, None, :, None]  # [B, 1, T, 1]
    seen = []
    for past, new, scale in zip(caches, news, x.scales or (None, None), strict=True):
        if scale is None:
            real = past.scatter_(2, index, new)[:, :, :total]
        else:
            stored = quantize(new, scale, past.dtype)
            past.view(torch.int8).scatter_(2, index, stored.view(torch.int8))  # torch cannot scatter float8
            real = dequantize(past[:, :, :total], scale).to(new.dtype)
        seen.append(real.masked_fill(~written, 0))  # what lies behind is undefined: even 0 times NaN would be seen
    return seen[0], seen[1]


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an int8 or float8_e4m3fn cache stores of `x` [B, Hkv, S, D]; `scale` is [Hkv]. See `headfold.plugins.attention.schema`."""
    real = x.float() / scale[:, None, None]
    return (real.round() if dtype == torch.int8 else real).clamp(*stored_range(dtype)).to(dtype)


def stored_range(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest number that a quantized cache of this dtype stores."""
    return next(ends for name, ends in QUANTIZED.items() if getattr(torch, name) == dtype)


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    """What a quantized cache [B, Hkv, T, D] stands for, in float32."""
    return stored.float() * scale[:, None, None]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis, in float32 or wider, then scaled in the dtype of `x` (Zhang and Sennrich 2019, equation 4).

    An export traces it as one op, which it would spell out in nine.
    """
    if torch.compiler.is_exporting():
        return cast(Tensor, rms_normalization(x, weight, epsilon))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE (Su et al. 2021, section 3.4.2) on the first R dimensions of `x` [B, H, S, D]; the tables are [B, 1, S, R/2]."""
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = rotated[..., :half], rotated[..., half:]
        pair = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pair, rest), -1)


def attention(inputs: AttentionInputs[Tensor], attributes: Attributes) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Attend, and the caches with the new tokens in them: those given, written to; in an export, new values of the registered op.

    Args:
        inputs: see `attend`.
        attributes: heads, scale, window, soft cap, RoPE pairing.

    Returns:
        [B, S, Hq*D] in the dtype of `query`, and the caches, None without any.
    """
    if inputs.past_key is None or inputs.past_value is None:
        return attend(inputs, attributes), None
    if not torch.compiler.is_exporting():
        return attend(inputs, attributes), (inputs.past_key, inputs.past_value)
    tensors = {name: getattr(inputs, name) for name in ALL_INPUTS if name != LAST_INDEX}
    output, key, value = grouped_query_attention(**tensors, **vars(attributes))
    return output, (key, value)


@torch.library.custom_op("headfold::GroupedQueryAttention", mutates_args=())
def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total_sequence_length: int,
    cos_cache: Tensor | None,
    sin_cache: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    head_sink: Tensor | None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
    softcap: float,
    rotary_interleaved: int,
    qk_norm_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The functional form of `attend`, which tracing needs: the caches are copied, not written."""
    present_key, present_value = past_key.clone(), past_value.clone()
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        past_key=present_key,
        past_value=present_value,
        past_lengths=past_lengths,
        total_sequence_length=total_sequence_length,
        cos_cache=cos_cache,
        sin_cache=sin_cache,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        key_scale=key_scale,
        value_scale=value_scale,
        head_sink=head_sink,
    )
    attributes = Attributes(
        num_heads, kv_num_heads, scale, local_window_size, softcap, rotary_interleaved, qk_norm_epsilon
    )
    output = attend(inputs, attributes)
    return output, present_key, present_value


@grouped_query_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op("headfold::RMSNormalization", mutates_args=())
def rms_normalization(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` as an op, so that an export traces it as ONNX's standard RMSNormalization."""
    return rms_norm(x, weight, epsilon)


@rms_normalization.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)
