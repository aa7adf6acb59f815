"""GPTQ against its definition, written out; and what it is for: products that are nearer than those of the nearest weights."""

import pytest
import torch

from headfold.export.model.rounding import nearest, restored, rounded
from headfold.export.quantization.gptq import best_scales, gptq
from headfold.export.quantization.sensitivity import choose_bits
from headfold.plugins.quantized.schema import BLOCK
from headfold.runtime.errors import ConfigError


def problem(columns: int, mixed: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, K], and inputs [400, K] of different sizes, that go together the more the larger `mixed` is."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs, mix = (torch.randn(rows, columns, generator=generator) for rows in (24, 400, columns))
    return weight, (inputs + mixed * inputs @ mix / columns**0.5) * torch.linspace(0.5, 2, columns)


def moments(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs.T @ inputs).double()


def by_definition(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Numbers [N, K] of one block: Frantar and Alistarh 2022, equation 3, the largest input first; inverses computed anew."""
    power = hessian.diagonal()
    damped = hessian + 0.01 * power.mean() * torch.eye(len(power), dtype=torch.float64)
    left, numbers = weight.double().clone(), torch.empty_like(weight)
    scales = best_scales(left, power + 0.01 * power.mean(), 4)
    remaining = power.argsort(descending=True, stable=True).tolist()
    while remaining:
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        column = remaining[0]
        numbers[:, column] = nearest(left[:, column], scales, 4)
        error = (left[:, column] - numbers[:, column] * scales) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    return numbers


@pytest.mark.parametrize("block", [32, 64, 128])
def test_one_block_is_rounded_as_the_paper_says(block) -> None:
    weight, inputs = problem(block, mixed=1.0)
    numbers = gptq(weight, moments(inputs), 4, block=block).values
    assert torch.equal(numbers, by_definition(weight, moments(inputs)).to(torch.int8))


@pytest.mark.parametrize("mixed", [0.0, 3.0])
def test_products_are_nearer_than_with_the_nearest_weights(mixed) -> None:
    weight, inputs = problem(8 * BLOCK, mixed)
    wrong = [
        (inputs @ (restored(rounding) - weight).T).square().mean().item()
        for rounding in (rounded(weight, 4), gptq(weight, moments(inputs), 4))
    ]
    assert wrong[1] < (0.9 if mixed == 0 else 0.5) * wrong[0]


def test_inputs_that_are_always_zero_are_no_trouble() -> None:
    weight, inputs = problem(2 * BLOCK, mixed=1.0)
    inputs[:, ::7] = 0
    for some in (inputs, torch.zeros_like(inputs)):
        rounding = gptq(weight, moments(some), 4)
        assert torch.isfinite(rounding.scales).all()
        assert rounding.values.min() >= -8
        assert rounding.values.max() <= 7


def test_inputs_that_are_huge_in_one_column_or_endless() -> None:
    weight, inputs = problem(2 * BLOCK, mixed=1.0)
    inputs[:, 3] *= 1e6
    in_float32 = (inputs.T @ inputs).double()  # so rounded that it is no second moment any more
    errors = (restored(gptq(weight, in_float32, 4)) - weight).abs()
    assert errors[:, 3].mean() < errors.mean() / 2  # what counts is rounded well
    with pytest.raises(ConfigError, match="too large for GPTQ"):
        gptq(weight, in_float32 * torch.inf, 4)


def test_eight_bits_go_where_they_gain_most_for_their_size() -> None:
    names = ["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "a.o_proj.weight", "b.up_proj.weight"]
    bits = dict.fromkeys(names, 4)
    shapes = dict.fromkeys(names, (10, 10))
    costs = {tuple(names[:3]): 0.3, (names[3],): 0.2, (names[4],): 0.05}
    assert choose_bits(bits, shapes, costs, 0.4, None) == bits | {names[3]: 8}
    assert choose_bits(bits, shapes, costs, 0.3, None) == dict.fromkeys(names, 8) | {names[4]: 4}
    assert choose_bits(bits, shapes, costs, None, 5.6) == bits | {names[3]: 8, names[4]: 8}
    assert choose_bits(bits, shapes, costs, None, 8.0) == dict.fromkeys(names, 8)
