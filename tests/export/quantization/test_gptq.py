"""GPTQ against its definition, written out; and what it is for: products that are nearer than those of the nearest weights."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.export.model.rounding import nearest, restored, rounded
from headfold.export.quantization.gptq import Inputs, best_scales, gptq
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


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.3 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def by_definition(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Numbers [N, K] of one block: Frantar and Alistarh 2022, equation 3, the largest input first; inverses computed anew."""
    power, moments = hessian.diagonal(), damped(hessian)
    left, numbers = weight.double().clone(), torch.empty_like(weight)
    scales = best_scales(left, moments.diagonal(), 4)
    remaining = power.argsort(descending=True, stable=True).tolist()
    while remaining:
        inverse = torch.linalg.inv(moments[remaining][:, remaining])
        column = remaining[0]
        numbers[:, column] = nearest(left[:, column], scales, 4)
        error = (left[:, column] - numbers[:, column] * scales) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    return numbers


@pytest.mark.parametrize("block", [32, 64, 128])
def test_one_block_is_rounded_as_the_paper_says(block) -> None:
    weight, inputs = problem(block, mixed=1.0)
    numbers = gptq(weight, Inputs.of(moments(inputs), block), 4).values
    assert torch.equal(numbers, by_definition(weight, moments(inputs)).to(torch.int8))


def test_what_inputs_lack_is_made_up_for() -> None:
    """Products of these inputs are as near as they get to those of the exact ones: by least squares, damped as GPTQ is."""
    weight, exact = problem(2 * BLOCK, mixed=1.0)
    inputs = exact + 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)) @ torch.rand(64, 64)
    found, lacking = Inputs.of(moments(inputs)), (exact - inputs).T @ inputs
    stay = (0.3 * moments(inputs).diagonal().mean()).sqrt() * torch.eye(64, dtype=torch.float64)
    rows = torch.cat([inputs.double(), stay])
    wanted = torch.cat([exact.double(), stay]) @ weight.T.double()
    best = torch.linalg.lstsq(rows, wanted).solution.T
    assert (best - weight).norm() > 0.1 * weight.norm()
    torch.testing.assert_close(found.made_up_for(weight, weight @ lacking).double(), best, rtol=0, atol=1e-4)


def test_products_behind_rounded_ones_are_nearer_for_it() -> None:
    weight, exact = problem(2 * BLOCK, mixed=1.0)
    first = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    entering, inputs = exact @ first.T, exact @ restored(rounded(first, 4)).T
    lacking, heard = (entering - inputs).T @ inputs, Inputs.of(moments(inputs))
    wrong = [
        (inputs @ restored(gptq(rows, heard, 4)).T - entering @ weight.T).norm()
        for rows in (weight, heard.made_up_for(weight, weight @ lacking))
    ]
    assert wrong[1] < 0.95 * wrong[0]


@pytest.mark.parametrize("mixed", [0.0, 3.0])
def test_products_are_nearer_than_with_the_nearest_weights(mixed) -> None:
    weight, inputs = problem(8 * BLOCK, mixed)
    wrong = [
        (inputs @ (restored(rounding) - weight).T).square().mean().item()
        for rounding in (rounded(weight, 4), gptq(weight, Inputs.of(moments(inputs)), 4))
    ]
    assert wrong[1] < (0.9 if mixed == 0 else 0.5) * wrong[0]


def test_inputs_that_are_always_zero_are_no_trouble() -> None:
    weight, inputs = problem(2 * BLOCK, mixed=1.0)
    inputs[:, ::7] = 0
    for some in (inputs, torch.zeros_like(inputs)):
        rounding = gptq(weight, Inputs.of(moments(some)), 4)
        assert torch.isfinite(rounding.scales).all()
        assert rounding.values.min() >= -8
        assert rounding.values.max() <= 7


def test_inputs_that_are_huge_in_one_column_or_endless() -> None:
    weight, inputs = problem(2 * BLOCK, mixed=1.0)
    inputs[:, 3] *= 1e6
    in_float32 = (inputs.T @ inputs).double()  # so rounded that it is no second moment any more
    errors = (restored(gptq(weight, Inputs.of(in_float32), 4)) - weight).abs()
    assert errors[:, 3].mean() < errors.mean() / 2  # what counts is rounded well
    with pytest.raises(ConfigError, match="too large for GPTQ"):
        Inputs.of(in_float32 * torch.inf)


def test_eight_bits_go_where_they_gain_most() -> None:
    names = ["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "a.o_proj.weight", "b.up_proj.weight"]
    bits = dict.fromkeys(names, 4)
    shapes = dict.fromkeys(names, (10, 10))
    costs = {tuple(names[:3]): {0: 0.3}, (names[3],): {0: 0.2}, (names[4],): {0: 0.05}}

    def chosen(*asked: float | None, bits=bits, shapes=shapes, costs=costs) -> dict[str, int]:
        widths, wide_rows = choose_bits(bits, shapes, costs, *asked)
        assert not wide_rows
        return widths

    assert chosen(0.4, None) == bits | {names[3]: 8}
    assert chosen(0.31, None) == bits | {names[3]: 8, names[4]: 8}
    assert chosen(0.28, None) == bits | dict.fromkeys(names[:3], 8)
    assert chosen(1e-9, None) == dict.fromkeys(names, 8)
    assert chosen(1.0, None) == bits
    assert chosen(None, 5.6) == bits | {names[3]: 8, names[4]: 8}
    assert chosen(None, 8.0) == dict.fromkeys(names, 8)
    large = dict(zip(names, [(104729, 1009), (1299709, 7), (15485863, 3), (7, 11), (13, 17)], strict=True))
    assert chosen(None, 8.0, shapes=large) == dict.fromkeys(names, 8)  # no common divisor, and too many steps
    some = bits | {names[0]: 8}
    assert chosen(None, 4.1, bits=some, costs={(names[1],): {0: 0.1}}) == some


def test_some_rows_of_the_vocabulary_have_eight_bits_where_all_are_too_many() -> None:
    bits, shapes = {"head": 4, "layer": 4}, {"head": (64, 10), "layer": (16, 10)}
    costs = {("head",): {0: 0.3, 16: 0.1, 32: 0.08}, ("layer",): {0: 0.1}}
    assert choose_bits(bits, shapes, costs, None, 4.8) == (bits, {"head": 16})
    assert choose_bits(bits, shapes, costs, None, 5.6) == (bits | {"layer": 8}, {"head": 16})
    assert choose_bits(bits, shapes, costs, None, 6.4) == (bits | {"layer": 8}, {"head": 32})
    assert choose_bits(bits, shapes, costs, None, 8.0) == (bits | {"layer": 8, "head": 8}, {})
    assert choose_bits(bits, shapes, costs, 0.21, None) == (bits, {"head": 16})
    assert choose_bits(bits, shapes, costs, 0.01, None) == (bits | {"layer": 8, "head": 8}, {})


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1), st.lists(st.floats(0, 1), max_size=2)), max_size=6),
    st.floats(4, 8),
    st.floats(1e-3, 4),
)
def test_no_other_choice_of_eight_bits_is_better(drawn, average, max_kl) -> None:
    """Each weight has so many rows, what four bits cost in all, and the share left where one row is wide, and two."""
    things = {f"layer.{number}.weight": thing for number, thing in enumerate(drawn)} or {"one": (2, 0.5, [])}
    bits, shapes = dict.fromkeys(things, 4), {name: (size, 32) for name, (size, *_) in things.items()}
    costs = {
        (name,): {0: cost} | {rows: share * cost for rows, share in enumerate(left, 1) if rows < size}
        for name, (size, cost, left) in things.items()
    }
    ways = [[*cost.items(), (things[name][0], 0.0)] for (name,), cost in costs.items()]  # wide rows, and what is left
    choices = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*ways)]
    everything = sum(size for size, *_ in things.values())

    def of(widths: Mapping[str, int], wide_rows: Mapping[str, int]) -> tuple[int, float]:
        assert all(widths[name] == 4 and 0 < rows < things[name][0] for name, rows in wide_rows.items())
        chosen = {name: things[name][0] if widths[name] == 8 else wide_rows.get(name, 0) for name in things}
        left = (0.0 if widths[name] == 8 else cost[chosen[name]] for (name,), cost in costs.items())
        return sum(chosen.values()), sum(left)

    room = (average - 4) / 4 * everything
    size, left = of(*choose_bits(bits, shapes, costs, None, average))
    assert size <= room
    assert left <= min(left for size, left in choices if size <= max(room - 1e-6, 0)) + 1e-9
    size, left = of(*choose_bits(bits, shapes, costs, max_kl, None))
    assert left <= max_kl + 1e-9
    assert size <= min(size for size, left in choices if left <= max_kl - 1e-9)
