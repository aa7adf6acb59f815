"""headfold::GroupedQueryAttention in torch: differentiable eager maths, and the registered op that an export traces.

Shapes are those of `headfold.plugins.schema`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.plugins.schema import Attributes


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    past_lengths: Tensor,
    total_sequence_length: int,
    cos_cache: Tensor,
    sin_cache: Tensor,
    attributes: Attributes,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Attend causally over the cache and the new tokens, writing the new keys and values **into** the caches.

    Without caches (training, scoring) the new tokens are all there is, and `past_lengths` must be zeros.

    Args:
        query: [B, S, Hq*D]; the result has its shape and dtype.
        key: [B, S, Hkv*D].
        value: [B, S, Hkv*D].
        past_key: [B, Hkv, C, D] or None. The caller makes sure that past_lengths + S <= C: a torch scatter checks it.
        past_value: [B, Hkv, C, D] or None.
        past_lengths: int64 [B].
        total_sequence_length: at least max(past_lengths) + S; only that many cache positions are looked at.
        cos_cache: [>= C, R/2], and `sin_cache` alike.
        sin_cache: see `cos_cache`.
        attributes: heads, scale, window, soft cap, RoPE pairing.
        q_norm_weight: [D] or None, and `k_norm_weight` alike.
        k_norm_weight: see `q_norm_weight`.
        key_scale: float32 [Hkv] of a quantized cache, which must then be given, and `value_scale` alike.
        value_scale: see `key_scale`.
    """
    a = attributes
    batch, length, _ = query.shape
    head_dim = query.shape[-1] // a.num_heads
    q = query.view(batch, length, a.num_heads, head_dim).transpose(1, 2)  # [B, Hq, S, D]
    k = key.view(batch, length, a.kv_num_heads, head_dim).transpose(1, 2)  # [B, Hkv, S, D]
    v = value.view(batch, length, a.kv_num_heads, head_dim).transpose(1, 2)  # [B, Hkv, S, D]
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, a.qk_norm_epsilon)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, a.qk_norm_epsilon)

    positions = past_lengths[:, None] + torch.arange(length, device=query.device)  # [B, S]
    cos, sin = cos_cache[positions][:, None], sin_cache[positions][:, None]  # [B, 1, S, R/2]
    q, k = rotate(q, cos, sin, bool(a.rotary_interleaved)), rotate(k, cos, sin, bool(a.rotary_interleaved))
    if past_key is not None and past_value is not None:
        index = positions[:, None, :, None].expand(batch, a.kv_num_heads, length, head_dim)
        if key_scale is not None and value_scale is not None:
            k, v = quantize(k, key_scale, past_key.dtype), quantize(v, value_scale, past_value.dtype)
            for past, new in ((past_key, k), (past_value, v)):
                past.view(torch.int8).scatter_(2, index, new.view(torch.int8))  # torch cannot scatter float8
            k = dequantize(past_key[:, :, :total_sequence_length], key_scale).to(q.dtype)  # [B, Hkv, T, D]
            v = dequantize(past_value[:, :, :total_sequence_length], value_scale).to(q.dtype)
        else:
            k = past_key.scatter_(2, index, k)[:, :, :total_sequence_length]  # [B, Hkv, T, D]
            v = past_value.scatter_(2, index, v)[:, :, :total_sequence_length]  # [B, Hkv, T, D]

    distance = positions[:, None, :, None] - torch.arange(k.shape[2], device=query.device)  # [B, 1, S, T]
    visible = distance >= 0
    if a.local_window_size > 0:
        visible &= distance < a.local_window_size
    if a.softcap > 0:
        groups = a.num_heads // a.kv_num_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = a.softcap * torch.tanh(q @ k.transpose(2, 3) * (a.scale / a.softcap))  # [B, Hq, S, T]
        output = scores.masked_fill(~visible, float("-inf")).softmax(-1, torch.float32).to(v.dtype) @ v
    else:
        gqa = a.num_heads != a.kv_num_heads
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=a.scale, enable_gqa=gqa)
    return output.transpose(1, 2).reshape(batch, length, a.num_heads * head_dim)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an int8 or float8_e4m3fn cache stores of `x` [B, Hkv, S, D]; `scale` is [Hkv]. See `headfold.plugins.schema`."""
    real = x.float() / scale[:, None, None]
    if dtype == torch.int8:
        return real.round().clamp(-128, 127).to(dtype)
    largest = torch.finfo(dtype).max
    return real.clamp(-largest, largest).to(dtype)


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    """What a quantized cache [B, Hkv, T, D] stands for, in float32."""
    return stored.float() * scale[:, None, None]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis, in float32 or wider, then scaled in the dtype of `x` (Zhang and Sennrich 2019, equation 4)."""
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


@torch.library.custom_op("headfold::GroupedQueryAttention", mutates_args=())
def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total_sequence_length: int,
    cos_cache: Tensor,
    sin_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
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
    attributes = Attributes(
        num_heads, kv_num_heads, scale, local_window_size, softcap, rotary_interleaved, qk_norm_epsilon
    )
    present_key, present_value = past_key.clone(), past_value.clone()
    tables = (cos_cache, sin_cache, attributes, q_norm_weight, k_norm_weight, key_scale, value_scale)
    output = attend(query, key, value, present_key, present_value, past_lengths, total_sequence_length, *tables)
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
