"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded column by column, each error made up for by the columns still to come.

Layer by layer, each on what the rounded layers before it hand on, so one layer and the residual streams are all that is in memory.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from headfold.export.model.rounding import Rounded, block_scales, form_of, nearest, restored
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running
from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.errors import ConfigError

_ROWS = 1 << 13  # of the head that are rounded at a time: they are as many as there are tokens
_TOGETHER = 2048  # tokens that go through a layer at a time
_DAMPING = 0.01  # of the mean of the second moments' diagonal, added to it (section 3.3 there)
_TRIED = [1 - 0.02 * step for step in range(16)]  # of the scale that holds the block's largest weight


@torch.inference_mode()
def gptq_layers(
    model: Running, names: Collection[str], tokens: Tensor, scales: torch.dtype, block: int, reporter: Reporter
) -> dict[str, Rounded]:
    """Weights of layers in four bits, calibrated on int64 tokens [N, S]; of those whose inputs can be heard: of nn.Linear.

    Args:
        model: its other weights (its embedding, say) may be rounded already.
        names: of weights to round, [N, K].
        tokens: see above.
        scales: dtype of the graph's.
        block: see `form_of`.
        reporter: told what goes on.
    """
    found = dict[str, Rounded]()
    parts = together(tokens)
    hidden = [model.enter(part) for part in parts]  # [N, S, hidden] each
    with reporter.step("round the layers with GPTQ", model.count) as advance:
        for index in range(model.count):
            with model.layer(index) as modules:
                linears = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, nn.Linear)}
                linears = {name: module for name, module in linears.items() if name in names}
                moments = _input_moments(linears, _run(model, index, parts, hidden))
                here = {name: gptq(model.read(name), heard, 4, scales, block) for name, heard in moments.items()}
                with model.replaced({name: restored(rounding) for name, rounding in here.items()}):
                    hidden = list(_run(model, index, parts, hidden))
                found |= here
            advance(1)
    return found


@torch.inference_mode()
def gptq_head(
    model: Running, name: str, tokens: Tensor, scales: torch.dtype, block: int, reporter: Reporter
) -> Rounded:
    """The head, of this name, in four bits, calibrated on what enters it, as `gptq_layers`.

    Its rows, a token's each, know nothing of each other.
    """
    with reporter.step("round the head with GPTQ"):
        inputs = (model.entering_head(part).flatten(0, -2) for part in together(tokens))
        moments = torch.stack([(x.T @ x).double() for x in inputs]).sum(0)
        parts = [gptq(rows, moments, 4, scales, block) for rows in torch.split(model.read(name), _ROWS)]
    return Rounded(4, torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))


def gptq(
    weight: Tensor, moments: Tensor, bits: Bits, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> Rounded:
    """Round a weight [N, K] whose inputs have these second moments, float64 [K, K], positive somewhere.

    Whole blocks and the columns in them go in the order of their inputs' size, largest first ("act order" of the authors' code), for
    the last ones have nobody to make up for them. A block's scale is found when its turn comes: the one of `_TRIED`, either sign, with
    the least error, weighed by the moments; `dtype` holds the scales. Blocks are as `form_of` has them.

    Raises:
        ConfigError: the moments are not finite.
    """
    count, width = weight.shape
    size = form_of(bits, width, block).block
    power = moments.diagonal().clone()
    order = _order(power, size)
    inverse = _inverse_factor(moments[order][:, order])  # [K, K], upper triangular
    left = weight.double()[:, order]  # what is still to round, corrected
    power = power[order] + _DAMPING * power.mean()
    numbers = torch.empty(count, width, dtype=torch.int8)
    scales = torch.empty(count, width // size)
    for start in range(0, width, size):
        own = slice(start, start + size)
        step = best_scales(left[:, own], power[own], bits, dtype)  # [N]
        errors = torch.empty(count, size, dtype=torch.float64)
        for offset in range(size):
            column = start + offset
            chosen = nearest(left[:, column], step, bits)
            numbers[:, order[column]] = chosen.to(torch.int8)
            errors[:, offset] = (left[:, column] - chosen * step) / inverse[column, column]
            left[:, column : start + size] -= errors[:, offset, None] * inverse[column, column : start + size]
        left[:, start + size :] -= errors @ inverse[own, start + size :]
        scales[:, order[start] // size] = step.float()
    return Rounded(bits, numbers, scales)


def best_scales(blocks: Tensor, power: Tensor, bits: Bits, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales [N] of blocks [N, block] with the least squared error, numbers of `dtype`; `power` [block] weighs its columns."""
    largest = block_scales(blocks, bits, dtype)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in _TRIED:
        for sign in (1, -1):
            scales = (sign * factor * largest).to(dtype).to(blocks.dtype)
            scales = torch.where(scales == 0, largest, scales)
            wrong = blocks - nearest(blocks, scales[:, None], bits) * scales[:, None]
            error = wrong.square() @ power
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _order(power: Tensor, block: int) -> Tensor:
    """Columns, largest input first, but block by block: int64 [K]."""
    blocks = power.view(-1, block)
    within = blocks.sort(stable=True, descending=True).indices + torch.arange(0, len(power), block)[:, None]
    return within[blocks.sum(1).sort(stable=True, descending=True).indices].flatten()


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse (section 3.3, step 3)."""
    mean = moments.diagonal().mean().item() or 1.0
    for damping in (
        _DAMPING,
        10 * _DAMPING,
        100 * _DAMPING,
    ):  # inputs that are huge in a few columns leave the others to rounding
        factor, failed = torch.linalg.cholesky_ex(
            moments + damping * mean * torch.eye(len(moments), dtype=moments.dtype)
        )
        if not failed and factor.isfinite().all():
            return cast(Tensor, torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True))
    raise ConfigError("the inputs of its products are too large for GPTQ", fix="Use --rounding nearest.")


def _run(model: Running, index: int, parts: Sequence[Tensor], hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """What a layer makes of the streams, part by part."""
    for part, entering in zip(parts, hidden, strict=True):
        yield model.run_layer(index, part, entering)


def _input_moments(linears: Mapping[str, nn.Linear], run: Iterator[Tensor]) -> dict[str, Tensor]:
    """The sum of x x^T of what enters each product, float64 [K, K], by weight; products of the same inputs share it."""
    moments, same = dict[str, Tensor](), dict[str, str]()
    last: tuple[Tensor, str] | None = None  # the input that was heard last, and of which product

    def hear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal last
            if last is not None and last[0] is inputs[0] and same.setdefault(name, last[1]) == last[1]:
                return
            x = inputs[0].flatten(0, -2)
            now = (x.T @ x).double()
            moments[name] = moments[name] + now if name in moments else now
            last = inputs[0], name

        return add

    hooks = [module.register_forward_pre_hook(hear(name)) for name, module in linears.items()]
    for _ in run:
        last = None
    for hook in hooks:
        hook.remove()
    return moments | {name: moments[first] for name, first in same.items() if first in moments}


def together(tokens: Tensor) -> tuple[Tensor, ...]:
    """Tokens [N, S] or streams [N, S, hidden], as many sequences at a time as go through a layer together."""
    return torch.split(tokens, max(_TOGETHER // tokens.shape[1], 1))
