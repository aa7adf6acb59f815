"""What each kind of TensorRT layer computes, in torch on the CPU: the meaning of an INetworkDefinition, one function per kind.

Arithmetic is float32 inside a layer and rounded to the layer's own dtype behind it. A kind, mode or operation that headfold's
lowerings do not produce is an error: better no answer than a guess.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.plugins.attention import tensorrt_plugin
from headfold.plugins.attention.schema import AttentionInputs
from headfold.plugins.attention.torch_op import attend
from headfold.plugins.dtypes import QUANTIZED, from_tensorrt
from headfold.runtime.errors import VerificationError

Inputs = Sequence[Tensor | None]
_QUANTIZED = tuple(getattr(torch, name) for name in QUANTIZED)


def run_layer(kind: str, layer: Any, inputs: Inputs) -> list[Tensor]:
    """The outputs of one layer; in-place layers write into their inputs and return them.

    Raises:
        VerificationError: the kind or one of its modes is unknown.
    """
    if kind not in _LAYERS:
        raise unknown(layer, f"is a {kind}")
    result = _LAYERS[kind](layer, inputs)
    return [result] if isinstance(result, Tensor) else result


def unknown(layer: Any, what: str) -> VerificationError:
    """The error for a layer whose meaning is not known here."""
    return VerificationError(
        f"layer {layer.name!r} {what}, which the network runner does not know",
        fix="No lowering of headfold makes it: the parser changed, or the graph is not headfold's.",
    )


def torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's name of a trt.DataType."""
    found: torch.dtype = getattr(torch, from_tensorrt(dtype))
    return found


def _name(value: object) -> str:
    return str(value).rpartition(".")[2]


def _mask_axes(mask: int) -> list[int]:
    return [axis for axis in range(32) if mask >> axis & 1]


def _required(inputs: Inputs, count: int) -> list[Tensor]:
    present = [tensor for tensor in inputs[:count] if tensor is not None]
    assert len(present) == count
    return present


def _cast(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    return x.to(torch_dtype(layer.get_output(0).dtype))


def _shape(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    return torch.tensor(x.shape, dtype=torch.int64)


_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "POW": torch.pow,
    "FLOOR_DIV": torch.floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
    "DIV": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
}


def _elementwise(layer: Any, inputs: Inputs) -> Tensor:
    a, b = _required(inputs, 2)
    operation = _name(layer.op)
    if operation not in _ELEMENTWISE:
        raise unknown(layer, f"does {operation}")
    if a.dtype != b.dtype or a.ndim != b.ndim:
        raise unknown(layer, f"mixes {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    return _ELEMENTWISE[operation](a, b)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "EXP": torch.exp,
    "LOG": torch.log,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "ERF": torch.erf,
    "SIN": torch.sin,
    "COS": torch.cos,
    "NOT": torch.logical_not,
}
_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "RELU": torch.relu,
    "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}


def _unary(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    if _name(layer.op) not in _UNARY:
        raise unknown(layer, f"does {_name(layer.op)}")
    return _UNARY[_name(layer.op)](x)


def _activation(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    if _name(layer.type) not in _ACTIVATION:
        raise unknown(layer, f"does {_name(layer.type)}")
    return _ACTIVATION[_name(layer.type)](x)


def _matmul(layer: Any, inputs: Inputs) -> Tensor:
    a, b = _required(inputs, 2)
    for side in ("op0", "op1"):
        if _name(getattr(layer, side)) not in {"NONE", "TRANSPOSE"}:
            raise unknown(layer, f"multiplies {_name(getattr(layer, side))}")
    a = a.mT if _name(layer.op0) == "TRANSPOSE" else a
    b = b.mT if _name(layer.op1) == "TRANSPOSE" else b
    return (a.float() @ b.float()).to(torch_dtype(layer.get_output(0).dtype))


def _reduce(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    axes, keep, wide = _mask_axes(layer.axes), layer.keep_dims, x.float() if x.is_floating_point() else x
    match _name(layer.op):
        case "SUM":
            return wide.sum(axes, keepdim=keep).to(x.dtype)
        case "AVG":
            return wide.mean(axes, keepdim=keep).to(x.dtype)
        case "MAX":
            return wide.amax(axes, keepdim=keep).to(x.dtype)
        case "MIN":
            return wide.amin(axes, keepdim=keep).to(x.dtype)
        case operation:
            raise unknown(layer, f"reduces by {operation}")


def _shuffle(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    x = x.permute(list(layer.first_transpose)[: x.ndim])
    dims = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else layer.reshape_dims
    if dims is not None:
        zero = layer.zero_is_placeholder
        x = x.reshape([x.shape[axis] if dim == 0 and zero else dim for axis, dim in enumerate(dims)])
    return x.permute(list(layer.second_transpose)[: x.ndim])


def _slice(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    if _name(layer.mode) != "STRICT_BOUNDS":
        raise unknown(layer, f"slices {_name(layer.mode)}")
    given = list(inputs) + [None] * (6 - len(inputs))  # data, start, shape, stride, fill, axes

    def parameter(position: int, name: str) -> list[int]:
        tensor = given[position]
        return list(map(int, tensor.tolist() if tensor is not None else getattr(layer, name)))

    start, size, stride = (parameter(i, name) for i, name in ((1, "start"), (2, "shape"), (3, "stride")))
    axes = layer.axes if given[5] is None else given[5].tolist()
    for axis, first, count, step in zip(axes or range(x.ndim), start, size, stride, strict=False):
        last = first + (count - 1) * step
        if count and not (0 <= first < x.shape[axis] and 0 <= last < x.shape[axis]):
            raise VerificationError(f"layer {layer.name!r} slices {first}..{last} of {x.shape[axis]} in axis {axis}")
        if step == 1:
            x = x.narrow(axis, first, count)
        else:
            x = x.index_select(axis, first + step * torch.arange(count))
    return x


def _concatenation(layer: Any, inputs: Inputs) -> Tensor:
    return torch.cat(_required(inputs, len(inputs)), layer.axis)


def _gather(layer: Any, inputs: Inputs) -> Tensor:
    x, index = _required(inputs, 2)
    limit = x.shape[layer.axis]
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
        raise VerificationError(f"layer {layer.name!r} gathers at {int(index.min())}..{int(index.max())} of {limit}")
    if _name(layer.mode) == "ELEMENT":
        return x.gather(layer.axis, index.long())
    if _name(layer.mode) != "DEFAULT" or layer.num_elementwise_dims:
        raise unknown(layer, f"gathers {_name(layer.mode)} with {layer.num_elementwise_dims} elementwise dimensions")
    axis = layer.axis
    return x.index_select(axis, index.long().flatten()).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _select(layer: Any, inputs: Inputs) -> Tensor:
    condition, a, b = _required(inputs, 3)
    return torch.where(condition, a, b)


def _fill(layer: Any, inputs: Inputs) -> Tensor:
    if _name(layer.operation) != "LINSPACE" or len(inputs) != 3:
        raise unknown(layer, f"fills {_name(layer.operation)} from {len(inputs)} inputs")
    shape, start, step = _required(inputs, 3)
    if len(shape) != 1:
        raise unknown(layer, f"fills {len(shape)} dimensions")
    return (start + step[0] * torch.arange(int(shape[0]))).to(torch_dtype(layer.get_output(0).dtype))


def _dequantize(layer: Any, inputs: Inputs) -> Tensor:
    values, scales = _required(inputs, 2)  # [N, K], [N, K / block]; or float8 [N, K], [N] or []
    by_output = layer.axis == 0 and scales.shape == values.shape[:1]
    if values.dtype == torch.float8_e4m3fn and values.ndim == len(inputs) == 2 and (by_output or scales.ndim == 0):
        return (values.float() * scales.float().view(-1, 1)).to(torch_dtype(layer.get_output(0).dtype))
    if layer.axis != 1 or values.ndim != 2 or scales.ndim != 2 or len(inputs) > 2:
        raise unknown(layer, f"dequantizes {tuple(values.shape)} with scales {tuple(scales.shape)}")
    wide = values.float().view(*scales.shape, -1) * scales.float()[..., None]
    return wide.flatten(1).to(torch_dtype(layer.get_output(0).dtype))


def _unsqueeze(layer: Any, inputs: Inputs) -> Tensor:
    x, axes = _required(inputs, 2)
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _squeeze(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    axes = inputs[1] if len(inputs) > 1 else None
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _identity(layer: Any, inputs: Inputs) -> Tensor:
    (x,) = _required(inputs, 1)
    return x


def _normalization(layer: Any, inputs: Inputs) -> Tensor:
    x, scale, bias = _required(inputs, 3)
    axes, wide = _mask_axes(layer.axes), x.float()
    if layer.num_groups != 1:
        raise unknown(layer, f"normalizes {layer.num_groups} groups")
    centered = wide - wide.mean(axes, keepdim=True)
    variance = centered.pow(2).mean(axes, keepdim=True)
    return (centered * torch.rsqrt(variance + layer.epsilon) * scale.float() + bias.float()).to(x.dtype)


def _rotary(layer: Any, inputs: Inputs) -> Tensor:
    x, cos, sin, positions = _required(inputs, 4)  # [B, H, S, D], [C, R/2] twice, [B, S]
    if int(positions.max()) >= len(cos):
        raise VerificationError(f"layer {layer.name!r} looks up position {int(positions.max())} of {len(cos)}")
    rotated = layer.rotary_embedding_dim or x.shape[-1]
    c, s = (table.float()[positions.long()][:, None] for table in (cos, sin))  # [B, 1, S, R/2]
    wide, half = x.float(), rotated // 2
    first = slice(0, rotated, 2) if layer.interleaved else slice(0, half)
    second = slice(1, rotated, 2) if layer.interleaved else slice(half, rotated)
    result = wide.clone()
    result[..., first] = wide[..., first] * c - wide[..., second] * s
    result[..., second] = wide[..., second] * c + wide[..., first] * s
    return result.to(x.dtype)


def _kv_cache_update(layer: Any, inputs: Inputs) -> Tensor:
    cache, update, index = _required(inputs, 3)  # [B, H, C, D], [B, H, S, D], [B]
    if _name(layer.cache_mode) != "LINEAR":
        raise unknown(layer, f"updates its cache {_name(layer.cache_mode)}")
    for row, start in enumerate(index.tolist()):
        end = start + update.shape[2]
        if end > cache.shape[2]:
            raise VerificationError(f"layer {layer.name!r} writes tokens {start} to {end} of {cache.shape[2]}")
        cache[row, :, start:end] = update[row]
    return cache


def _attention(layer: Any, inputs: Inputs) -> Tensor:
    """Softmax(q k^T + mask) v; the parser has multiplied the scale into q and k already."""
    attention = layer.attention
    q, k, v = (tensor.float() for tensor in _required(inputs, 3))  # [B, Hq, S, D], [B, Hkv, T, D] twice
    mask = inputs[3] if len(inputs) > 3 else None
    lengths = (getattr(attention, "query_lengths", None), getattr(attention, "key_value_lengths", None))
    if _name(attention.norm_op) != "SOFTMAX" or len(inputs) > 4 or any(x is not None for x in lengths):
        raise unknown(layer, "is no plain attention")
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT  # [B, Hq, S, T]
    rows, columns = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
    match _name(attention.causal_kind):
        case "UPPER_LEFT":
            scores = scores.masked_fill(columns > rows, float("-inf"))
        case "LOWER_RIGHT":
            scores = scores.masked_fill(columns > rows + (scores.shape[3] - scores.shape[2]), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ v).to(torch_dtype(layer.get_output(0).dtype))


def _plugin(layer: Any, inputs: Inputs) -> list[Tensor]:
    """headfold's plugin, through the torch op in float32; an aliased cache is updated in place, another one copied first."""
    plugin = layer.plugin
    identity = (plugin.plugin_namespace, plugin.plugin_name, plugin.plugin_version)
    if identity != (tensorrt_plugin.NAMESPACE, tensorrt_plugin.NAME, tensorrt_plugin.PLUGIN_VERSION):
        raise unknown(layer, f"is the plugin {'::'.join(identity)}")
    cache = inputs[tensorrt_plugin.ALIASES[1]]
    names = tensorrt_plugin.input_names(len(inputs), cache is not None and cache.dtype in _QUANTIZED)
    if names is None:
        raise unknown(layer, f"has {len(inputs)} inputs")
    x = AttentionInputs[Tensor](**dict(zip(names, _required(inputs, len(names)), strict=True)))
    assert x.past_key is not None
    assert x.past_value is not None
    presents = []
    for position, past in ((1, x.past_key), (2, x.past_value)):
        aliased = plugin.get_aliased_input(position)
        presents.append(inputs[aliased] if aliased >= 0 else past.clone())
    total = cast(Tensor, x.total_sequence_length).shape[1]
    written = max(total, int(x.past_lengths.max()) + x.query.shape[1])  # padding is written too, behind T
    keys, values = (past[:, :, :written].clone() for past in (x.past_key, x.past_value))
    if x.scales is None:
        keys, values = keys.float(), values.float()
    wide = {name: tensor.float() for name, tensor in x.given().items() if tensor.is_floating_point()}
    wide |= {"past_key": keys, "past_value": values}
    output = attend(replace(x, **wide, total_sequence_length=total), plugin.attributes)
    for present, new in zip(_required(presents, 2), (keys, values), strict=True):
        present[:, :, :written] = new.to(present.dtype)
    return [output.to(x.query.dtype), *_required(presents, 2)]


_LAYERS: dict[str, Callable[[Any, Inputs], Tensor | list[Tensor]]] = {
    "ACTIVATION": _activation,
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": _identity,
    "CAST": _cast,
    "CONCATENATION": _concatenation,
    "DEQUANTIZE": _dequantize,
    "ELEMENTWISE": _elementwise,
    "FILL": _fill,
    "GATHER": _gather,
    "IDENTITY": _identity,
    "KV_CACHE_UPDATE": _kv_cache_update,
    "MATRIX_MULTIPLY": _matmul,
    "NORMALIZATION": _normalization,
    "PLUGIN_V3": _plugin,
    "REDUCE": _reduce,
    "ROTARY_EMBEDDING": _rotary,
    "SELECT": _select,
    "SHAPE": _shape,
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "SQUEEZE": _squeeze,
    "UNARY": _unary,
    "UNSQUEEZE": _unsqueeze,
}
