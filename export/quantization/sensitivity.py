"""What four bits in each weight alone cost the model, and which weights should have eight; and whose inputs should not have them.

Weights that the graph joins into one product (query, key and value) have one width, and count as one; so do all experts of a layer.
Embedding and head may have eight bits in their first rows alone: vocabularies give small numbers to frequent tokens, which matter most
(of SmolLM2's 49,152 rows the first 3,072 are three fifths of what four bits cost in all of them).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headfold.export.data.calibration import together
from headfold.export.exportables.base import Tensors
from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.model.hearing import hearing, linears
from headfold.export.model.rounding import Width, bit_count, forms_of, rounded_rows
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running
from headfold.plugins.quantized.schema import BLOCK

TOKENS = 256  # measured on; each weight takes about half a forward pass
_STEPS = 1 << 14  # that all sizes are told apart in
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of rows that may have eight bits while the others have four
# Nats, by the number of first rows that have eight bits where the others have four, 0 among them
Costs = Mapping[int, float]


@torch.inference_mode()
def sensitivities(
    model: Running,
    tensors: Tensors,
    groups: Collection[tuple[str, ...]],
    transposed: Collection[str],
    block: int,
    tokens: Tensor,
    reporter: Reporter,
) -> dict[tuple[str, ...], dict[int, float]]:
    """KL(as it is || with these weights in four bits), nats, a mean over tokens [N, S]; a group's weights together.

    They are of one layer, or of none: embedding and head, which may be wide in part. `tensors` are the model's; for those that are
    `transposed` see Form, for `block` `form_of`.
    """
    (entering,) = model.enter([tokens])  # [N, S, hidden]
    exact, costs = model.run_from(0, tokens, entering).log_softmax(-1), dict[tuple[str, ...], dict[int, float]]()

    def in_four_bits(names: Collection[str], wide_rows: int = 0) -> AbstractContextManager[None]:
        rows = dict.fromkeys(names, wide_rows)
        forms = forms_of(dict.fromkeys(names, 4), tensors.shapes(), block, transposed, wide_rows=rows)
        return model.reading(RoundedTensors(tensors, forms))  # when they come: a vocabulary's may be large

    layers = {names: layer for names in groups if (layer := model.layer_of(names[0])) is not None}
    # What a layer hands on where the weights of one group have four bits
    streams = model.zeros(len(layers), *entering.shape)
    with reporter.step("measure what four bits in each weight cost", model.count) as advance:
        for names in (names for names in groups if names not in layers):
            costs[names] = dict[int, float]()
            for rows in (0, *(_wide_rows(tensors.shapes()[names[0]][0]) if len(names) == 1 else ())):
                with in_four_bits(names, rows):
                    costs[names][rows] = _kl(exact, model(tokens).logits)
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
            costs[names] = {0: _kl(exact, logits)}
    return costs


@torch.inference_mode()
def by_loss_of_inputs(model: Running, blocks: Mapping[str, int], tokens: Tensor) -> list[str]:
    """Weights of layers' products, those first that lose most when their inputs have eight bits, as kernels round them.

    By the squared error of the product over its own squares, on int64 tokens [N, S].

    Args:
        model: with the weights that the products have.
        blocks: of each weight's columns; an input has a scale in each.
        tokens: see above.
    """
    parts, lost = together(tokens), dict[str, list[tuple[float, float]]]()

    def hear(name: str, module: nn.Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            blocked = x.reshape(len(x), -1, blocks[name])  # [rows, G, block]
            wrong, exact = (rounded_rows(blocked) - blocked).flatten(-2) @ module.weight.T, x @ module.weight.T
            lost.setdefault(name, []).append((wrong.square().sum().item(), exact.square().sum().item()))

        return add

    hidden = model.enter(parts)
    for index in range(model.count):
        with model.layer(index) as modules:
            heard = [(module, hear(name, module)) for name, module in linears(modules).items() if name in blocks]
            with hearing(heard):
                hidden = [model.run_layer(index, *pair) for pair in zip(parts, hidden, strict=True)]

    def share(name: str) -> float:
        wrong, exact = map(sum, zip(*lost[name], strict=True))
        return wrong / (exact or 1.0)

    return sorted(lost, key=share, reverse=True)


def _wide_rows(count: int) -> list[int]:
    """How many of the first rows of a weight with so many may have eight bits, multiples of `BLOCK`."""
    counts = {int(count * share) // BLOCK * BLOCK for share in _SHARES}
    return sorted(counts - {0})


def _kl(exact: Tensor, logits: Tensor) -> float:
    """KL of log probabilities to logits, both [N, S, V], a mean over tokens; one sequence after the other, since they are large."""
    pairs = zip(exact, logits, strict=True)
    return torch.stack([(p.exp() * (p - x.log_softmax(-1))).sum(-1) for p, x in pairs]).mean().item()


def choose_bits(
    bits: Mapping[str, Width],
    shapes: Mapping[str, tuple[int, ...]],
    costs: Mapping[tuple[str, ...], Costs],
    max_kl: float | None,
    average: float | None,
) -> tuple[dict[str, Width], dict[str, int]]:
    """Give eight bits to the weights that gain most by them in so many bytes, of those that would have four.

    Args:
        bits: of each weight where nothing gains.
        shapes: of the weights.
        costs: see `sensitivities`. They are taken to add up.
        max_kl: the fewest that bring their sum down to this, in nats; or, None,
        average: the best that the weights can have with so many bits on average.

    Returns:
        Bits of each weight, and of those of four bits some of whose first rows have eight how many have.
    """
    things = []  # of each weight what it can have instead, all its rows in eight bits or some, and what that gains
    for names, cost in costs.items():
        size = sum(math.prod(shapes[name]) for name in names)
        columns, choices = shapes[names[0]][-1], sorted(cost)[1:]
        things.append([(size, cost[0]), *((rows * columns, cost[0] - cost[rows]) for rows in choices)])
    total = sum(math.prod(shapes[name]) for name in bits)
    room = sum(size for (size, _), *_ in things)
    if average is not None:
        spent = sum(bit_count(width) * math.prod(shapes[name]) for name, width in bits.items())
        room = min(room, int((average * total - spent) / 4))
    enough = sum(cost[0] for cost in costs.values()) - max_kl if max_kl is not None else math.inf
    taken = dict(zip(costs, _knapsack(things, room, enough), strict=True))
    wide_rows = {names[0]: sorted(costs[names])[choice - 1] for names, choice in taken.items() if choice > 1}
    return dict(bits) | {name: 8 for names, choice in taken.items() if choice == 1 for name in names}, wide_rows


def _knapsack(things: Sequence[Sequence[tuple[int, float]]], room: int, enough: float) -> list[int]:
    """Which size of each thing, with what it gains, in the least room that gains enough, or the most that it can: from 1; 0 is none.

    By dynamic programming, in steps of what divides all sizes or of a part in `_STEPS` of them all. By what they gain for their size a
    head, a fifth of a small model, would be passed over as soon as it no longer fits.
    """
    whole = sum(max(size for size, _ in sizes) for sizes in things)
    step = max(math.gcd(*(size for sizes in things for size, _ in sizes)), -(-whole // _STEPS), 1)
    steps = [[(-(-size // step), gain) for size, gain in sizes] for sizes in things]
    count = sum(max(sizes)[0] for sizes in steps) if room >= whole else max(room, 0) // step
    best, choices = np.zeros(count + 1), list[NDArray[np.intp]]()  # the most that each room gains, and how
    for sizes in steps:
        gained = np.full((1 + len(sizes), count + 1), -np.inf)
        gained[0] = best
        for row, (size, gain) in zip(gained[1:], sizes, strict=True):
            row[size:] = best[: max(count + 1 - size, 0)] + gain
        choices.append(gained.argmax(0))
        best = gained.max(0)
    taken, at = list[int](), int(min(np.searchsorted(best, enough), np.searchsorted(best, best[-1])))
    for sizes, choice in zip(reversed(steps), reversed(choices), strict=True):
        taken.append(int(choice[at]))
        at -= sizes[taken[-1] - 1][0] if taken[-1] else 0
    return taken[::-1]
