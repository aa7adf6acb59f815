"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded column by column, each error made up for by the columns still to come.

Layer by layer, each on what the rounded layers before it hand on, so one layer and the residual streams are all that is in memory.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from headfold.export.model.rounding import Rounded, block_scales, form_of, nearest, restored
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running, together
from headfold.export.quantization.shelf import Shelf
from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.errors import ConfigError

_HEAD_ROWS = 1 << 13  # of the head that are rounded at a time: they are as many as there are tokens
_ROWS = 1 << 10  # of second moments that are added to at a time
_DAMPING = 0.01  # of the mean of the second moments' diagonal, added to it (section 3.3 there)
_TRIED = [1 - 0.02 * step for step in range(16)]  # of the scale that holds the block's largest weight


@torch.inference_mode()
def gptq_layers(
    model: Running,
    names: Collection[str],
    tokens: Tensor,
    scales: Mapping[str, torch.dtype],
    block: int,
    reporter: Reporter,
    open_shelf: Callable[[Sequence[Tensor]], Shelf] | None = None,
) -> dict[str, Rounded]:
    """Weights of layers in four bits, calibrated on int64 tokens [N, S]; of those whose inputs can be heard: of nn.Linear.

    Args:
        model: its other weights (its embedding, say) may be rounded already.
        names: of weights to round, [N, K].
        tokens: see above.
        scales: their dtypes, by weight.
        block: see `form_of`.
        reporter: told what goes on.
        open_shelf: opens where what is found lies, told the streams that enter the first layer; None: in memory.
    """
    found = dict[str, Rounded]()
    parts = together(tokens)
    hidden = [model.enter(part) for part in parts]  # [N, S, hidden] each
    shelf = open_shelf(hidden) if open_shelf is not None else None
    with reporter.step("round the layers with GPTQ", model.count) as advance:
        for index in range(model.count):
            with model.layer(index) as modules:
                linears = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, nn.Linear)}
                linears = {name: module for name, module in linears.items() if name in names}
                here = shelf.next_layer(_weights(modules)) if shelf is not None else None
                moments = _input_moments(linears, _run(model, index, parts, hidden)) if here is None else {}
            del modules, linears  # beside the moments of a wide layer its weights may be too much
            if here is None:
                here = {
                    name: gptq(model.read(name), moments.pop(name), 4, scales[name], block) for name in list(moments)
                }
                here = shelf.put(here) if shelf is not None else here
            with model.replaced({name: restored(rounding) for name, rounding in here.items()}), model.layer(index):
                hidden = list(_run(model, index, parts, hidden))
            found |= here
            advance(1)
    if shelf is not None and shelf.found:
        reporter.note(f"{shelf.found} of {model.count} layers had been rounded by an export that did not finish")
    return found


@torch.inference_mode()
def gptq_head(
    model: Running, name: str, tokens: Tensor, scales: Mapping[str, torch.dtype], block: int, reporter: Reporter
) -> Rounded:
    """The head, of this name, in four bits, calibrated on what enters it, as `gptq_layers`.

    Its rows, a token's each, know nothing of each other.
    """
    with reporter.step("round the head with GPTQ"):
        inputs = (entering.flatten(0, -2) for entering in model.entering_head(together(tokens)))
        moments = torch.stack([(x.T @ x).double() for x in inputs]).sum(0)
        parts = [gptq(rows, moments, 4, scales[name], block) for rows in torch.split(model.read(name), _HEAD_ROWS)]
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
    factor = _reversed_factor(moments, order)
    del moments
    diagonal = factor.diagonal().flip(0)
    left = weight[:, order].double()  # what is still to round; behind it, what rounding the others has changed
    power = power[order] + _DAMPING * power.mean()
    numbers = torch.empty(count, width, dtype=torch.int8)
    scales = torch.empty(count, width // size)
    for start in range(0, width, size):
        own = slice(start, start + size)
        carried = factor[width - own.stop :, width - own.stop : width - start].flip(0, 1) / diagonal[own]
        back, within = left[:, :start] @ carried[:start], carried[start:]
        # What would be best if no column from here on were rounded
        best = torch.linalg.solve_triangular(within, back, upper=True, left=False, unitriangular=True)
        step = best_scales(left[:, own] + best, power[own], bits, dtype)  # [N]
        wanted = left[:, own] + back  # [N, size]
        for offset in range(size):
            column = start + offset
            chosen = nearest(wanted[:, offset], step, bits)
            numbers[:, order[column]] = chosen.to(torch.int8)
            left[:, column] -= chosen * step
            wanted[:, offset + 1 :] += left[:, column, None] * within[offset, offset + 1 :]
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


def _reversed_factor(moments: Tensor, order: Tensor) -> Tensor:
    """R of the damped moments R R^T in this order, upper triangular, rows and columns last to first: float64 [K, K], lower triangular.

    With an error e_j in each column j before it, column k is rounded best near w_k + sum_j e_j R_jk / R_kk: what section 3.3 there has
    from the inverse, without one ("LDLQ" of Chee et al. 2023, arXiv 2307.13304). Made in place: moments are large.
    """
    backwards = order.flip(0)
    mean = moments.diagonal().mean().item() or 1.0
    for times in (1, 10, 100):  # inputs that are huge in a few columns leave the others to rounding
        factor = moments[backwards[:, None], backwards].mT  # in the order of LAPACK, which then copies nothing
        factor.diagonal().add_(times * _DAMPING * mean)
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed and factor.diagonal().isfinite().all():  # what is not finite ends up there
            return factor
        del factor
    raise ConfigError("the inputs of its products are too large for GPTQ", fix="Use --rounding nearest.")


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All of some modules, by their names."""
    return {f"{at}.{name}": x for at, module in modules.items() for name, x in module.named_parameters(recurse=False)}


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
            if name not in moments:
                moments[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            for rows, columns in zip(torch.split(moments[name], _ROWS), torch.split(x.T, _ROWS), strict=True):
                rows += columns @ x
            last = inputs[0], name

        return add

    hooks = [module.register_forward_pre_hook(hear(name)) for name, module in linears.items()]
    for _ in run:
        last = None
    for hook in hooks:
        hook.remove()
    return moments | {name: moments[first] for name, first in same.items() if first in moments}
