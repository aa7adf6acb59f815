"""Second moments of what enters a layer's attention on calibration tokens: the statistics that a conversion takes."""

import torch
from torch import Tensor

from headfold.export.conversion.heads import Moments
from headfold.export.conversion.streams import Streams, blocks
from headfold.export.model.decoder import Attention
from headfold.plugins.attention.torch_op import rms_norm, rotate


@torch.inference_mode()
def moments(streams: Streams) -> Moments:
    """The statistics of the layer that the streams stand before, of the original model."""
    attention, hidden = streams.attention, streams.original
    a, biased = attention.attributes, attention.q_proj.bias is not None
    width = hidden.shape[2] + biased
    head_dim = attention.q_proj.out_features // a.num_heads
    inputs = torch.zeros(width, width, dtype=torch.float64)
    attended = torch.zeros(a.num_heads, width, width, dtype=torch.float64)
    queries = torch.zeros(a.num_heads, head_dim, head_dim, dtype=torch.float64)
    for rows in blocks(hidden):
        x = streams.layer.input_layernorm(rows)
        wide = torch.cat((x, torch.ones_like(x[..., :1])), 2) if biased else x  # [n, S, I]
        q, weights = attention_weights(attention, x, streams.rope)  # [n, H, S, D], [n, H, S, S]
        inputs += second_moment(wide.flatten(0, 1))
        for head in range(a.num_heads):
            attended[head] += second_moment((weights[:, head] @ wide).flatten(0, 1))
            queries[head] += second_moment(q[:, head].flatten(0, 1))
    count = hidden.shape[0] * hidden.shape[1]
    return Moments(inputs / count, attended / count, queries / count)


def attention_weights(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The queries before RoPE, [n, H, S, D], and the softmax of the scores, [n, H, S, S], of normed inputs [n, S, hidden]."""
    a, (n, length, _) = attention.attributes, x.shape
    q = attention.q_proj(x).view(n, length, a.num_heads, -1).transpose(1, 2)
    k = attention.k_proj(x).view(n, length, a.kv_num_heads, -1).transpose(1, 2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q = rms_norm(q, attention.q_norm.weight, a.qk_norm_epsilon)
        k = rms_norm(k, attention.k_norm.weight, a.qk_norm_epsilon)
    cos, sin = (table[None, None, :length] for table in rope)  # [1, 1, S, R/2]
    keys = rotate(k, cos, sin, False).repeat_interleave(a.num_heads // a.kv_num_heads, 1)
    scores = rotate(q, cos, sin, False) @ keys.mT * a.scale  # [n, H, S, S]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & ((distance < a.local_window_size) | (a.local_window_size <= 0))
    return q, scores.masked_fill(~visible, float("-inf")).softmax(-1)


def second_moment(rows: Tensor) -> Tensor:
    """The sum of x x^T over rows [N, I], [I, I]: each batch in the decoder's dtype, then float64."""
    return (rows.T @ rows).double()
