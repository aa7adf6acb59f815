"""What four bits in each weight alone cost the model, and which weights should have eight.

Weights that the graph joins into one product (query, key and value) have one width, and count as one; so do all experts of a layer.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headfold.export.model.rounding import Width, as_rounded
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running

TOKENS = 256  # measured on; each weight takes about half a forward pass
_STEPS = 1 << 14  # that all sizes are told apart in


@torch.inference_mode()
def sensitivities(
    model: Running,
    groups: Collection[tuple[str, ...]],
    transposed: Collection[str],
    block: int,
    tokens: Tensor,
    reporter: Reporter,
) -> dict[tuple[str, ...], float]:
    """KL(as it is || with these weights in four bits), nats, a mean over tokens [N, S]; a group's weights together.

    They are of one layer, or of none: embedding and head. For those that are `transposed` see Form, for `block`
    `form_of`.
    """
    (entering,) = model.enter([tokens])  # [N, S, hidden]
    exact, costs = model.run_from(0, tokens, entering).log_softmax(-1), dict[tuple[str, ...], float]()

    def in_four_bits(names: Collection[str]) -> AbstractContextManager[None]:
        weights = ((name, model.read(name), name in transposed) for name in names)
        return model.replaced({name: as_rounded(x, 4, transposed=turned, block=block) for name, x, turned in weights})

    layers = {names: layer for names in groups if (layer := model.layer_of(names[0])) is not None}
    # What a layer hands on where the weights of one group have four bits
    streams = model.zeros(len(layers), *entering.shape)
    with reporter.step("measure what four bits in each weight cost", model.count) as advance:
        for names in (names for names in groups if names not in layers):
            with in_four_bits(names):
                costs[names] = _kl(exact, model(tokens).logits)
        for index in range(model.count):
            with model.layer(index):
                for stream, (names, layer) in zip(streams, layers.items(), strict=True):
                    if layer < index:
                        stream.copy_(model.run_layer(index, tokens, stream))
                    elif layer == index:
                        with in_four_bits(names):
                            stream.copy_(model.run_layer(index, tokens, entering))
                entering = model.run_layer(index, tokens, entering)
            advance(1)
        for names, logits in zip(layers, model.behind([tokens] * len(layers), streams), strict=True):
            costs[names] = _kl(exact, logits)
    return costs


def _kl(exact: Tensor, logits: Tensor) -> float:
    """KL of log probabilities to logits, both [N, S, V], a mean over tokens; one sequence after the other, since they are large."""
    pairs = zip(exact, logits, strict=True)
    return torch.stack([(p.exp() * (p - x.log_softmax(-1))).sum(-1) for p, x in pairs]).mean().item()


def choose_bits(
    bits: Mapping[str, Width],
    shapes: Mapping[str, tuple[int, ...]],
    costs: Mapping[tuple[str, ...], float],
    max_kl: float | None,
    average: float | None,
) -> dict[str, Width]:
    """Give eight bits to the weights that gain most by them in so many bytes, of those that would have four.

    Args:
        bits: of each weight where nothing gains.
        shapes: of the weights.
        costs: see `sensitivities`. They are taken to add up.
        max_kl: the fewest that bring their sum down to this, in nats; or, None,
        average: the best that the weights can have with so many bits on average.
    """
    size = {name: math.prod(shapes[name]) for name in bits}
    sizes, gains = [sum(size[name] for name in names) for names in costs], list(costs.values())
    room = sum(sizes)
    if average is not None:
        spent = sum(bits[name] * size[name] for name in bits)
        room = min(room, int((average * sum(size.values()) - spent) / 4))
    enough = sum(gains) - max_kl if max_kl is not None else math.inf
    taken = _knapsack(sizes, gains, room, enough)
    return dict(bits) | {name: 8 for names, wide in zip(costs, taken, strict=True) if wide for name in names}


def _knapsack(sizes: Sequence[int], gains: Sequence[float], room: int, enough: float) -> list[bool]:
    """Which of some things, in the least of this room that gains enough, or the most that it can.

    By dynamic programming, in steps of what divides all sizes or of a part in `_STEPS` of them all. By what they gain for their size a
    head, a fifth of a small model, would be passed over as soon as it no longer fits.
    """
    step = max(math.gcd(*sizes), -(-sum(sizes) // _STEPS), 1)
    steps = [-(-size // step) for size in sizes]
    count = sum(steps) if room >= sum(sizes) else max(room, 0) // step
    best, takes = np.zeros(count + 1), list[NDArray[np.bool_]]()  # the most that each room gains
    for needed, gain in zip(steps, gains, strict=True):
        without = best[needed:]
        takes.append(best[: len(without)] + gain > without)
        best[needed:] = np.maximum(without, best[: len(without)] + gain)
    taken, at = list[bool](), int(min(np.searchsorted(best, enough), np.searchsorted(best, best[-1])))
    for needed, take in zip(reversed(steps), reversed(takes), strict=True):
        taken.append(at >= needed and bool(take[at - needed]))
        at -= needed * taken[-1]
    return taken[::-1]
