"""Multi-head to grouped-query attention, or fewer groups of it: a pure function on a state dict and calibration statistics.

The result is a plain model of the same family. All arithmetic is in float64; `heads.py` has the mathematics of a group,
`statistics.py` collects the statistics, `checkpoint.py` converts checkpoints layer by layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from headfold.export.conversion import heads as merging
from headfold.export.conversion.heads import INITS, NEED_STATISTICS, Geometry, Heads, Init, Moments
from headfold.export.model.config import ModelConfig
from headfold.runtime.errors import ConfigError, InputError

Grouping = Literal["contiguous", "cluster"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConvertOptions:
    """How many key/value heads, how they start, and which query heads share one.

    `contiguous` keeps the order of the heads; `cluster` puts together those that lose least, reordering query heads with their
    columns of the output projection. `seed` is that of `random`.

    Raises:
        InputError: an unknown start or grouping.
    """

    kv_heads: int
    init: Init = "svd"
    grouping: Grouping = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known, name in ((self.init, INITS, "init"), (self.grouping, GROUPINGS, "grouping")):
            if value not in known:
                raise InputError(f"{value!r} is unknown", where=f"--{name}", fix=f"Choose {', '.join(known)}.")

    @property
    def needs_statistics(self) -> bool:
        """Whether a conversion reads the calibration statistics."""
        return self.init in NEED_STATISTICS or self.grouping == "cluster"


def possible_heads(config: ModelConfig) -> list[int]:
    """Numbers of key/value heads that a model can be converted to; the last is what it has."""
    return [n for n in range(1, config.num_key_value_heads + 1) if config.num_attention_heads % n == 0]


def converted_config(config: ModelConfig, options: ConvertOptions) -> ModelConfig:
    """The configuration after the conversion.

    Raises:
        ConfigError: the number of key/value heads does not divide the query heads, or exceeds the present one.
    """
    queries, present, wanted = config.num_attention_heads, config.num_key_value_heads, options.kv_heads
    divisors = possible_heads(config)
    fix = f"Choose {', '.join(map(str, divisors))}."
    if wanted > present:
        raise ConfigError(
            f"{wanted} key/value heads are more than the {present} that there are", where="--kv-heads", fix=fix
        )
    if wanted not in divisors:
        raise ConfigError(f"{wanted} does not divide the {queries} query heads", where="--kv-heads", fix=fix)
    return replace(config, num_key_value_heads=wanted)


def attention_prefix(layer: int) -> str:
    """What the names of a layer's attention tensors begin with."""
    return f"model.layers.{layer}.self_attn."


def convert_layer(
    part: Tensors, config: ModelConfig, options: ConvertOptions, moments: Moments | None, layer: int
) -> dict[str, Tensor]:
    """Convert one layer's attention tensors (names without the layer's prefix), in the dtypes they have.

    Args:
        part: q_proj, k_proj, v_proj, o_proj weights and biases; anything else passes through.
        config: of the source.
        options: what to make.
        moments: the layer's statistics; may be None unless `options.needs_statistics`.
        layer: its index, which with the seed determines `random`.
    """
    target = converted_config(config, options)
    heads = unpack(part, config)
    groups = _groups(heads, moments, config, options)
    generator = torch.Generator().manual_seed(options.seed * 100_003 + layer)
    merged = [_merge(heads, moments, group, config, options, generator) for group in groups]
    return {**part, **pack(merged, target, part)}


def unpack(part: Tensors, config: ModelConfig) -> Heads:
    """The heads of a layer in float64; the key and value head of a group stand once per query head of it."""
    queries, dim = config.num_attention_heads, config.head_dim
    share = queries // config.num_key_value_heads

    def rows(name: str) -> Tensor:
        weight = part[f"{name}.weight"].double()  # [heads * D, hidden]
        if config.qkv_bias:
            weight = torch.cat((weight, part[f"{name}.bias"].double()[:, None]), 1)
        return weight.view(-1, dim, weight.shape[1])  # [heads, D, I]

    output = part["o_proj.weight"].double()  # [hidden, H * D]
    return Heads(
        rows("q_proj"),
        rows("k_proj").repeat_interleave(share, 0),
        rows("v_proj").repeat_interleave(share, 0),
        output.view(-1, queries, dim).permute(1, 2, 0),
    )


def pack(groups: list[Heads], config: ModelConfig, part: Tensors) -> dict[str, Tensor]:
    """The inverse of `unpack`, from one merged `Heads` per group, in the dtypes of `part`."""
    rows = {
        "q_proj": torch.cat([group.q for group in groups]),  # [H, D, I]
        "k_proj": torch.stack([group.k for group in groups]),  # [G, D, I]
        "v_proj": torch.stack([group.v for group in groups]),
    }
    result: dict[str, Tensor] = {}
    for name, stacked in rows.items():
        flat = stacked.flatten(0, 1)  # [heads * D, I]
        result[f"{name}.weight"] = flat[:, : config.hidden_size]
        if config.qkv_bias:
            result[f"{name}.bias"] = flat[:, -1]
    output = torch.cat([group.o for group in groups])  # [H, D, hidden]
    result["o_proj.weight"] = output.flatten(0, 1).T
    return {name: tensor.to(part[name].dtype).contiguous() for name, tensor in result.items()}


def _merge(
    heads: Heads,
    moments: Moments | None,
    group: list[int],
    config: ModelConfig,
    options: ConvertOptions,
    generator: torch.Generator,
) -> Heads:
    part = heads.take(group)
    geometry = Geometry(config.rotary_dim, config.qk_norm)
    match options.init:
        case "random":
            return merging.random(part, generator)
        case "first":
            return merging.first(part)
        case "mean":
            return merging.mean(part)
        case "procrustes":
            return merging.procrustes(part, _required(moments).take(group), geometry)
        case "svd":
            return merging.svd(part, _required(moments).take(group), geometry)


def _required(moments: Moments | None) -> Moments:
    if moments is None:
        raise InputError(
            "needs calibration statistics", where="convert", fix="Give them: see headfold.export.conversion.statistics."
        )
    return moments


def _groups(heads: Heads, moments: Moments | None, config: ModelConfig, options: ConvertOptions) -> list[list[int]]:
    """The query heads of each new group. Heads that share a key/value head already stay together where that is possible."""
    count, present = config.num_attention_heads, config.num_key_value_heads
    unit = count // present if present % options.kv_heads == 0 else 1  # query heads that move as one
    units = [list(range(start, start + unit)) for start in range(0, count, unit)]
    size = len(units) // options.kv_heads
    contiguous = [list(range(start, start + size)) for start in range(0, len(units), size)]
    if options.grouping == "contiguous" or options.kv_heads == 1 or size == 1:
        chosen = contiguous
    else:
        chosen = partition(pair_losses(heads, _required(moments), units, config), contiguous)
    return [[head for index in group for head in units[index]] for group in chosen]


def pair_losses(heads: Heads, moments: Moments, units: list[list[int]], config: ModelConfig) -> Tensor:
    """What each two units would lose if they shared a key/value head, [units, units]: values and keys, relative to the layer."""
    firsts = [unit[0] for unit in units]
    root = merging.root(moments.inputs)
    attended = merging.root(moments.attended.mean(0))
    result = torch.zeros(len(units), len(units), dtype=torch.float64)
    whole_value, whole_key = 0.0, 0.0
    values, keys = result.clone(), result.clone()
    for a in range(len(firsts)):
        for b in range(a):
            both = units[a] + units[b]
            lost, whole = merging.value_loss(heads.v[both], heads.o[both], attended)
            values[a, b] = values[b, a] = lost
            whole_value += whole.item()
            lost, whole = merging.key_loss(heads.k[both], moments.queries[both], root, config.rotary_dim)
            keys[a, b] = keys[b, a] = lost
            whole_key += whole.item()
    return values / whole_value + keys / whole_key


def partition(losses: Tensor, start: list[list[int]]) -> list[list[int]]:
    """Groups of the sizes of `start` with a small sum of pair losses inside: swaps of two members until none helps."""
    groups = [list(group) for group in start]
    improved = True
    while improved:
        improved = False
        for a in range(len(groups)):
            for b in range(a):
                for i, x in enumerate(groups[a]):
                    for j, y in enumerate(groups[b]):
                        x, y = groups[a][i], groups[b][j]
                        before = losses[x, groups[a]].sum() + losses[y, groups[b]].sum()
                        after = losses[y, groups[a]].sum() + losses[x, groups[b]].sum() - 2 * losses[x, y]
                        if after < before - 1e-12:
                            groups[a][i], groups[b][j] = y, x
                            improved = True
    return sorted(sorted(group) for group in groups)
