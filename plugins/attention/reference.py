"""headfold::GroupedQueryAttention in plain numpy: the oracle of every body and kernel.

Clear, in float64, and slow on purpose.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.attention.schema import AttentionInputs, Attributes
from headfold.plugins.dtypes import QUANTIZED

Array = NDArray[Any]


def grouped_query_attention(inputs: AttentionInputs[Array], attributes: Attributes) -> tuple[Array, Array, Array]:
    """Append the new tokens to the caches and attend causally, one query at a time.

    Shapes are those of `headfold.plugins.attention.schema`. Computes in float64 and returns the dtype of `query`.
    With scales [Hkv] the caches are int8, or float8_e4m3fn of ml_dtypes, and stand for `stored * scale`: a new token is rounded to the
    nearest (half to even), held to the dtype's range, and attended to as it is stored.
    Sources: grouped heads, Ainslie et al. 2023 section 2.2; RoPE, Su et al. 2021 section 3.4.2; RMSNorm, Zhang and
    Sennrich 2019 equation 4; soft cap, Gemma 2 report section 2.

    Raises:
        ValueError: a sequence's new tokens do not fit its cache.
    """
    a, x = attributes, inputs
    assert x.past_key is not None
    assert x.past_value is not None
    batch, length, _ = x.query.shape
    capacity, head_dim = x.past_key.shape[2:]
    group = a.num_heads // a.kv_num_heads
    given = np.concatenate([part for part in (x.query, x.key, x.value) if part is not None], -1).astype(np.float64)
    heads = given.reshape(batch, length, -1, head_dim)
    q, k, v = np.split(heads, [a.num_heads, a.num_heads + a.kv_num_heads], 2)  # [B, S, H, D]
    if x.norms is not None:
        q, k = (rms_norm(part, weight, a.qk_norm_epsilon) for part, weight in zip((q, k), x.norms, strict=True))

    present_key, present_value = x.past_key.astype(np.float64), x.past_value.astype(np.float64)
    key_scale, value_scale = x.scales or (None, None)
    if key_scale is not None and value_scale is not None:
        present_key *= key_scale[:, None, None]
        present_value *= value_scale[:, None, None]
    output = np.zeros((batch, length, a.num_heads, head_dim))
    for b in range(batch):
        start = int(x.past_lengths[b])
        if start + length > capacity:
            raise ValueError(f"sequence {b} has {start} tokens and {length} new ones: over the capacity of {capacity}")
        for s in range(length):
            position = start + s
            key, query = k[b, s], q[b, s]
            if x.tables is not None:
                cos, sin = (table[position].astype(np.float64) for table in x.tables)  # [R/2]
                key, query = (rotate(part, cos, sin, bool(a.rotary_interleaved)) for part in (key, query))
            present_key[b, :, position] = quantize(key, key_scale, x.past_key.dtype)
            present_value[b, :, position] = quantize(v[b, s], value_scale, x.past_value.dtype)
            first = max(0, position + 1 - a.local_window_size) if a.local_window_size > 0 else 0
            for h in range(a.num_heads):
                scores = present_key[b, h // group, first : position + 1] @ query[h] * a.scale  # [visible tokens]
                if a.softcap > 0:
                    scores = a.softcap * np.tanh(scores / a.softcap)
                sink = -np.inf if x.head_sink is None else float(x.head_sink[h])
                highest = max(scores.max(), sink)
                weights = np.exp(scores - highest)
                output[b, s, h] = (
                    weights
                    / (weights.sum() + np.exp(sink - highest))
                    @ present_value[b, h // group, first : position + 1]
                )
    if key_scale is not None and value_scale is not None:
        present_key, present_value = present_key / key_scale[:, None, None], present_value / value_scale[:, None, None]
        if x.past_key.dtype == np.int8:  # nearly integers
            present_key, present_value = np.rint(present_key), np.rint(present_value)
    return (
        output.reshape(batch, length, -1).astype(x.query.dtype),
        present_key.astype(x.past_key.dtype),
        present_value.astype(x.past_value.dtype),
    )


def quantize(x: Array, scale: Array | None, dtype: np.dtype[Any]) -> Array:
    """What a cache of `dtype` with these scales [H] makes of `x` [H, D]; `x` itself without scales."""
    if scale is None:
        return x
    real = x / scale[:, None]
    least, most = QUANTIZED["int8" if dtype == np.int8 else "float8_e4m3fn"]
    stored: Array = np.clip(np.rint(real) if dtype == np.int8 else real, least, most).astype(dtype)
    return stored.astype(np.float64) * scale[:, None]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis; `weight` is [last axis of x]."""
    scale: Array = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale * weight


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotate the first R dimensions of `x` [..., D] by the angles of one position: `cos` and `sin` are [R/2]."""
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result
