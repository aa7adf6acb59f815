"""What four bits in each weight alone cost the model, and which weights should have eight.

Weights that the graph joins into one product (query, key and value) have one width, and count as one.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headfold.export.model.decoder import Decoder, Layer, sequence_layout
from headfold.export.model.rounding import Width, restored, rounded
from headfold.export.progress import Reporter

TOKENS = 256  # measured on; each weight takes about half a forward pass
_JOINED = ("q_proj", "k_proj", "v_proj")


@torch.inference_mode()
def sensitivities(
    decoder: Decoder, bits: Mapping[str, Width], tokens: Tensor, reporter: Reporter
) -> dict[tuple[str, ...], float]:
    """KL(as it is || with these weights in four bits), nats, a mean over tokens [N, S]; weights joined into one product together."""
    logits, *inputs = _run(decoder, decoder.model.embed_tokens(tokens), 0)
    exact, costs = logits.log_softmax(-1), dict[tuple[str, ...], float]()
    groups = list(joined(name for name, width in bits.items() if width == 4))
    with reporter.step("measure what four bits in each weight cost", len(groups)) as advance:
        for names in groups:
            index = int(names[0].split(".")[2])
            weights = [decoder.get_parameter(name) for name in names]
            kept = [weight.data for weight in weights]
            for weight in weights:
                weight.data = restored(rounded(weight.data, 4))
            now = _run(decoder, inputs[index], index)[0].log_softmax(-1)
            for weight, data in zip(weights, kept, strict=True):
                weight.data = data
            costs[names] = (exact.exp() * (exact - now)).sum(-1).mean().item()
            advance(1)
    return costs


def joined(names: Iterable[str]) -> Iterable[tuple[str, ...]]:
    """The weights, those together that have one width."""
    groups = dict[str, list[str]]()
    for name in names:
        parent, own, _ = name.rsplit(".", 2)
        groups.setdefault(f"{parent}.qkv" if own in _JOINED else name, []).append(name)
    return map(tuple, groups.values())


def choose_bits(
    bits: Mapping[str, Width],
    shapes: Mapping[str, tuple[int, ...]],
    costs: Mapping[tuple[str, ...], float],
    max_kl: float | None,
    average: float | None,
) -> dict[str, Width]:
    """Give eight bits to the weights that gain most by them, for their size, of those that would have four.

    Args:
        bits: of each weight where nothing gains.
        shapes: of the weights.
        costs: see `sensitivities`. They are taken to add up.
        max_kl: as many as bring their sum down to this, in nats; or, None,
        average: as many as the weights can have, with so many bits on average.
    """
    size = {name: shapes[name][0] * shapes[name][1] for name in bits}
    chosen, left = dict(bits), sum(costs.values())
    spent = sum(bits[name] * size[name] for name in bits)
    for names in sorted(costs, key=lambda names: costs[names] / sum(size[name] for name in names), reverse=True):
        more = 4 * sum(size[name] for name in names)
        if max_kl is not None and left <= max_kl:
            break
        if average is not None and spent + more > average * sum(size.values()):
            continue
        chosen |= dict.fromkeys(names, 8)
        left, spent = left - costs[names], spent + more
    return chosen


def _run(decoder: Decoder, hidden: Tensor, first: int) -> list[Tensor]:
    """Logits [N, S, V], then what entered each layer from the layer `first` on."""
    ones = torch.ones(hidden.shape[:2], dtype=torch.long)
    layout, rope, entered = sequence_layout(ones, ones), (decoder.cos_cache, decoder.sin_cache), []
    for layer in list(decoder.model.layers)[first:]:
        entered.append(hidden)
        hidden = cast(Layer, layer)(hidden, layout, rope, None)[0]
    head = decoder.model.embed_tokens.weight if decoder.lm_head is None else decoder.lm_head.weight
    return [F.linear(decoder.model.norm(hidden), head), *entered]
