"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded column by column, each error made up for by the columns still to come.

Product after product, each on what the rounded ones before it hand on, and so that it makes up for what those got wrong (QEP, Arai and
Ichikawa 2025, arXiv 2504.09629). One layer, its inputs and the residual streams are all that is in memory.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from headfold.export.data.calibration import together
from headfold.export.model.hearing import hearing, linears
from headfold.export.model.rounding import (
    Rounded,
    Width,
    block_scales,
    form_of,
    held_scales,
    in_parts,
    joined,
    nearest,
    restored,
    rounded,
    unit_of,
)
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running
from headfold.export.quantization.shelf import InMemory, Shelf
from headfold.plugins.quantized.schema import BLOCK
from headfold.runtime.errors import ConfigError

# Of the mean of the second moments' diagonal, added to it: what holds weights where they are. With the 0.01 of the paper (section 3.3)
# they make up for noise, too, and other text than the calibration's loses; with 1 they make up for too little
_DAMPING = 0.3
_ROWS = 512  # of a weight, in float64 at a time
_TRIED = [1 - 0.02 * step for step in range(16)]  # of the scale that holds the block's largest weight


@dataclass
class _Heard:
    """Products that take the same inputs."""

    names: list[str]  # of their weights
    inputs: list[Tensor]  # bfloat16 [N, S, K], of each part; where a product computes twice, the first ones


@torch.inference_mode()
def gptq_layers(
    model: Running,
    names: Collection[str],
    width: Width,
    tokens: Tensor,
    exact: list[Tensor],
    entering: list[Tensor],
    scales: Mapping[str, torch.dtype],
    block: int,
    reporter: Reporter,
    shelf: Shelf | InMemory,
) -> None:
    """Put weights of layers in four bits on a shelf, calibrated on int64 tokens [N, S]: those whose inputs can be heard, of nn.Linear.

    Args:
        model: its other weights (its embedding, say) may be rounded already.
        names: of weights to round, [N, K].
        width: what to.
        tokens: see above.
        exact: what enters the first layer where nothing is rounded, [N, S, hidden], of the tokens `together`. Weights of eight bits are
            taken for exact ones in what layers make of it.
        entering: the same of this model. Both are emptied: they are large, and soon of no use.
        scales: their dtypes, by weight.
        block: see `form_of`.
        reporter: told what goes on.
        shelf: what lies there of these layers is not rounded again.
    """
    parts, streams, hidden = together(tokens), list(exact), list(entering)
    exact.clear()
    entering.clear()
    with reporter.step("round the layers with GPTQ", model.count) as advance:
        for index in range(model.count):
            with model.layer(index) as modules:
                lies_there = shelf.next_layer(_weights(modules))
                products = {name: m for name, m in linears(modules).items() if name in names and not lies_there}
                streams, heard = _heard(products, _run(model, index, parts, streams))
            del modules, products  # beside the moments of a wide layer its weights may be too much
            if not lies_there:
                shelf.put(_round_layer(model, index, heard, width, parts, hidden, scales, block))
            own = (name for name in shelf if model.layer_of(name) == index)
            with model.replaced({name: restored(shelf[name]) for name in own}), model.layer(index):
                hidden = list(_run(model, index, parts, hidden))
            advance(1)
    if shelf.found:
        reporter.note(f"{shelf.found} of {model.count} layers had been rounded by an export that did not finish")


def _round_layer(
    model: Running,
    index: int,
    heard: list[_Heard],
    width: Width,
    parts: Sequence[Tensor],
    hidden: Sequence[Tensor],
    scales: Mapping[str, torch.dtype],
    block: int,
) -> dict[str, Rounded]:
    """A layer's products in four bits, in the order in which they compute, where these streams enter it; `heard` is emptied."""
    found = dict[str, Rounded]()
    while heard:
        group = heard.pop(0)
        before = {name: restored(rounding) for name, rounding in found.items()}
        if model.streams:  # what computes only behind the inputs need not come
            before |= {name: torch.empty(0) for later in (group, *heard) for name in later.names}
        with model.replaced(before), model.layer(index) as modules:
            module = modules[group.names[0].removesuffix(".weight")]
            entering = (model.enter_module(module, index, *pair) for pair in zip(parts, hidden, strict=True))
            moments, lacking = _moments_and_lacking(entering, group.inputs)
        del before, modules, module
        wanted = {name: model.read(name) @ lacking for name in group.names}
        del lacking  # [K, K]; with wide layers all of this is large
        inputs = Inputs.of(moments, form_of(width, len(moments), block).block)
        del moments
        for name in group.names:
            weight = inputs.made_up_for(model.read(name), wanted.pop(name))
            found[name] = gptq(weight, inputs, width, scales[name])
        del inputs, weight  # before others are heard
    return found


@torch.inference_mode()
def gptq_head(
    model: Running,
    name: str,
    tokens: Tensor,
    scales: Mapping[str, torch.dtype],
    block: int,
    wide_rows: int,
    reporter: Reporter,
) -> Rounded:
    """The head, of this name, in four bits, calibrated on what enters it, as `gptq_layers`; but for `wide_rows`, see Form."""
    with reporter.step("round the head with GPTQ"):
        moments = _moments(model.entering_head(together(tokens)), model.config.hidden_size)
        # In float32 only a few rows at a time: it is large
        wide, others = torch.tensor_split(model.stored(name), [wide_rows])
        in_four_bits = gptq(others, Inputs.of(moments, block), 4, scales[name])
        return joined([rounded(wide, 8, scales[name], block=block), in_four_bits] if wide_rows else [in_four_bits])


@dataclass(frozen=True)
class Inputs:
    """What GPTQ has to know of the inputs of products, [K]."""

    block: int  # of their weights
    order: Tensor  # of columns, largest input first ("act order" of the authors' code), but block by block
    power: Tensor  # float64 [K], what an error in each column counts, in this order
    factor: Tensor  # see `_reversed_factor`

    @classmethod
    def of(cls, moments: Tensor, block: int = BLOCK) -> Self:
        """Of second moments, [K, K]; for `block` see `form_of`.

        Raises:
            ConfigError: the moments are not finite.
        """
        power = moments.diagonal().double()
        size = math.gcd(len(power), block)
        order = _order(power, size)
        factor = _reversed_factor(moments, order)
        return cls(size, order, power[order] + _DAMPING * power.mean(), factor)

    def made_up_for(self, weight: Tensor, wanted: Tensor) -> Tensor:
        """A weight W, float32 [N, K], that makes up for what its inputs lack; `wanted` is W L, float32, and becomes it.

        L [K, K] is the sum of (x - y) y^T: y are the inputs, x what they were before rounding. W + W L M^-1, with M the damped
        moments, is what QEP, its alpha being 1, rounds in W's place.
        """
        backwards = self.order.flip(0)
        for rows, own in zip(torch.split(wanted, _ROWS), torch.split(weight, _ROWS), strict=True):
            more = rows[:, backwards].double()
            more = torch.linalg.solve_triangular(self.factor.T, more, upper=True, left=False)
            more = torch.linalg.solve_triangular(self.factor, more, upper=False, left=False)
            rows[:, backwards] = more.add_(own[:, backwards]).float()
        return wanted


def gptq(weight: Tensor, inputs: Inputs, bits: Width, dtype: torch.dtype = torch.float32) -> Rounded:
    """Round a weight [N, K], of any dtype, for these inputs, some of which are not zero.

    A block's scale is found when its turn comes: the one of `_TRIED`, either sign, with the least error, weighed by the inputs; `dtype`
    holds the scales. The last blocks and columns have nobody to make up for them.
    """
    unit = unit_of(weight, bits, dtype)
    return in_parts(weight, lambda rows: _gptq_rows(rows, inputs, bits, dtype, unit))


def _gptq_rows(weight: Tensor, inputs: Inputs, bits: Width, dtype: torch.dtype, unit: float) -> Rounded:
    count, width = weight.shape
    size, order, power, factor = inputs.block, inputs.order, inputs.power, inputs.factor
    diagonal = factor.diagonal().flip(0)
    left = weight[:, order].double()  # what is still to round; behind it, what rounding the others has changed
    numbers = torch.empty(count, width, dtype=torch.int8)
    scales = torch.empty(count, width // size)
    for start in range(0, width, size):
        own = slice(start, start + size)
        carried = factor[width - own.stop :, width - own.stop : width - start].flip(0, 1) / diagonal[own]
        back, within = left[:, :start] @ carried[:start], carried[start:]
        # What would be best if no column from here on were rounded
        best = torch.linalg.solve_triangular(within, back, upper=True, left=False, unitriangular=True)
        step = best_scales(left[:, own] + best, power[own], bits, dtype, unit)  # [N]
        wanted = left[:, own] + back  # [N, size]
        for offset in range(size):
            column = start + offset
            chosen = nearest(wanted[:, offset], step, bits)
            numbers[:, order[column]] = chosen.to(torch.int8)
            left[:, column] -= chosen * step
            wanted[:, offset + 1 :] += left[:, column, None] * within[offset, offset + 1 :]
        scales[:, order[start] // size] = step.float()
    return Rounded(bits, numbers, scales)


def best_scales(
    blocks: Tensor, power: Tensor, bits: Width, dtype: torch.dtype = torch.float32, unit: float = 1.0
) -> Tensor:
    """Scales [N] of blocks [N, block] with the least squared error, as graphs have them; `power` [block] weighs its columns."""
    largest = block_scales(blocks, bits, dtype, unit)
    best, least = largest, torch.full_like(largest, torch.inf)
    signs = (1,) if bits == "float4" else (1, -1)  # of float4 there are as many numbers on either side
    for factor in _TRIED:
        for sign in signs:
            scales = held_scales(sign * factor * largest, bits, dtype, unit)
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
    mean = moments.diagonal().double().mean().item() or 1.0
    for times in (1, 10, 100):  # inputs that are huge in a few columns leave the others to rounding
        factor = torch.empty_like(moments, dtype=torch.float64)
        for own, source in zip(factor, backwards, strict=True):
            own[:] = moments[source, backwards]
        factor.diagonal().add_(times * _DAMPING * mean)
        if _factorize(factor):
            return factor
        del factor
    raise ConfigError("the inputs of its products are too large for GPTQ", fix="Use --rounding nearest.")


def _factorize(matrix: Tensor, panel: int = 512) -> bool:
    """Cholesky's lower factor in a matrix's place, which PyTorch's copies; above the diagonal is then nothing of use.

    False: it is not positive definite, or not finite.
    """
    for start in range(0, len(matrix), panel):
        own, below = slice(start, start + panel), slice(start + panel, None)
        matrix[start:, own] -= matrix[start:, :start] @ matrix[own, :start].T
        corner, failed = torch.linalg.cholesky_ex(matrix[own, own])
        if failed or not corner.diagonal().isfinite().all():
            return False
        matrix[own, own] = corner
        matrix[below, own] = torch.linalg.solve_triangular(corner.T, matrix[below, own], upper=True, left=False)
    return True


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All of some modules, buffers among them, by their names."""
    return {
        f"{at}.{name}": x
        for at, module in modules.items()
        for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def _run(model: Running, index: int, parts: Sequence[Tensor], hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """What a layer makes of the streams, part by part."""
    for part, entering in zip(parts, hidden, strict=True):
        yield model.run_layer(index, part, entering)


def _heard(products: Mapping[str, nn.Linear], run: Iterator[Tensor]) -> tuple[list[Tensor], list[_Heard]]:
    """What a run hands on, and what enters these products in it, in the order in which they compute."""
    found, results, seen = list[_Heard](), list[Tensor](), set[str]()
    last: Tensor | None = None  # the input that was heard before

    def hear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, known = inputs[0], next((group for group in found if name in group.names), None)
            nonlocal last
            if known is None and last is x:
                found[-1].names.append(name)
            elif known is None:
                found.append(_Heard([name], [x.bfloat16()]))
            elif known.names[0] == name and name not in seen:
                known.inputs.append(x.bfloat16())
            seen.add(name)
            last = x

        return add

    with hearing((module, hear(name)) for name, module in products.items()):
        for result in run:
            results.append(result)
            seen.clear()
            last = None
    return results, found


def _moments(run: Iterator[Tensor], width: int) -> Tensor:
    """Of inputs [..., K]: the sum of x x^T, [K, K]."""
    moments = torch.zeros(width, width)
    for inputs in run:
        x = inputs.flatten(0, -2)
        moments.addmm_(x.T, x)
    return moments


def _moments_and_lacking(run: Iterator[Tensor], exact: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, and what the inputs lack beside these, which are used up: [K, K], see `Inputs.made_up_for`."""
    lacking = torch.zeros(exact[0].shape[-1], exact[0].shape[-1])

    def lack(inputs: Tensor) -> Tensor:
        x = inputs.flatten(0, -2)
        lacking.addmm_((exact.pop(0).flatten(0, -2) - x).T, x)
        return inputs

    return _moments(map(lack, run), len(lacking)), lacking
