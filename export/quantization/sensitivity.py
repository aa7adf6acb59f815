"""What four bits in each weight alone cost the model, and which weights should have eight.

Weights that the graph joins into one product (query, key and value) have one width, and count as one; so do all experts of a layer.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from headfold.export.model.rounding import Width, restored, rounded
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running

TOKENS = 256  # measured on; each weight takes about half a forward pass


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
    entering = model.enter(tokens)  # [N, S, hidden]
    exact, costs = model.run_from(0, tokens, entering).log_softmax(-1), dict[tuple[str, ...], float]()

    def measure(index: int | None, run: Callable[[], Tensor]) -> None:
        for names in (names for names in groups if model.layer_of(names[0]) == index):
            found = {name: rounded(model.read(name), 4, transposed=name in transposed, block=block) for name in names}
            with model.replaced({name: restored(weight) for name, weight in found.items()}):
                now = run().log_softmax(-1)
            costs[names] = (exact.exp() * (exact - now)).sum(-1).mean().item()
            advance(1)

    with reporter.step("measure what four bits in each weight cost", len(groups)) as advance:
        measure(None, lambda: model(tokens).logits)  # embedding and head
        for index in range(model.count):
            measure(index, partial(model.run_from, index, tokens, entering))
            entering = model.run_layer(index, tokens, entering)
    return costs


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
    size = {name: math.prod(shapes[name]) for name in bits}
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
