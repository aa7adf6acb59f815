"""What a checkpoint holds in few bits, in the form that a graph has it in: every number is the checkpoint's own."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_of_decoder import Kind, quantized

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.gguf.blocks import blocks_of
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.exportables.kept import kept, kept_forms
from headfold.export.model.rounding import Form, restored
from headfold.export.model.storing import stored_part, stored_shapes
from headfold.plugins.quantized.reference import dequantized

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Quantized(MemoryCheckpoint):
    """One tensor, `name`, and its parts."""

    part: QuantizedTensor | None = None

    def quantized(self, name: str) -> QuantizedTensor | None:
        return self.part


def of(part: QuantizedTensor, name: str = "w", config=None) -> Quantized:
    return Quantized(Path("memory"), config, {name: part.dequantize()}, part=part)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).half() / 50 + 0.01


# Rows, columns: 6, 384
GROUPS = QuantizedTensor(integers(0, 16, 6, 384), scales(6, 3), integers(0, 16, 6, 3), (1, 128), 4)
CASES: dict[str, tuple[QuantizedTensor, Form]] = {
    "four bits, groups of 128, zero points": (GROUPS, Form(4, 128, zeros=True)),
    "symmetric: zero points of 8": (replace(GROUPS, zeros=torch.full((6, 3), 8, dtype=torch.uint8)), Form(4, 128)),
    "no zero points at all, unsigned": (replace(GROUPS, zeros=None), Form(4, 128, zeros=True)),
    "two bits": (
        replace(GROUPS, values=integers(0, 4, 6, 384), zeros=integers(0, 4, 6, 3), bits=2),
        Form(4, 128, zeros=True),
    ),
    "groups of 64": (
        QuantizedTensor(integers(0, 16, 6, 384), scales(6, 6), integers(0, 16, 6, 6), (1, 64), 4),
        Form(4, 64, zeros=True),
    ),
    "a last group that is shorter": (
        QuantizedTensor(integers(0, 16, 6, 320), scales(6, 3), integers(0, 16, 6, 3), (1, 128), 4),
        Form(4, 64, zeros=True),
    ),
    "eight bits, signed, a scale per row": (
        QuantizedTensor(integers(-128, 128, 6, 96, dtype=torch.int8), scales(6, 1), None, (1, 96), 8),
        Form(8, 32),
    ),
    "eight bits, signed, blocks of rows, zero points": (
        QuantizedTensor(
            integers(-128, 128, 6, 64, dtype=torch.int8),
            scales(2, 2),
            integers(-128, 128, 2, 2, dtype=torch.int8),
            (4, 32),
            8,
        ),
        Form(8, 32, zeros=True),
    ),
    "offsets": (
        QuantizedTensor(integers(0, 16, 6, 64), scales(6, 2), None, (1, 32), 4, offsets=-scales(6, 2)),
        Form(4, 32, offsets=True),
    ),
    "offsets that no float32 holds once half of the range is in them": (
        QuantizedTensor(
            integers(0, 16, 6, 64), scales(6, 2) * 3e4, None, (1, 32), 4, offsets=torch.full((6, 2), 1.1e-9)
        ),
        Form(4, 32, zeros=True, offsets=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_kept(case) -> None:
    part, form = CASES[case]
    rounding = kept(of(part), "w", torch.float32)
    assert rounding is not None
    assert rounding.form == form
    assert torch.equal(restored(rounding), part.dequantize())


def test_columns_of_groups_that_do_not_follow_one_another_are_stored_in_their_order() -> None:
    groups = torch.arange(384)[torch.randperm(384, generator=torch.Generator().manual_seed(0))] // 128
    part = replace(GROUPS, groups=groups)
    rounding = kept(of(part), "w", torch.float32)
    assert rounding is not None
    assert torch.equal(restored(rounding), part.dequantize())
    assert rounding.form == Form(4, 128, zeros=True, order=rounding.form.order)
    parts = {name: stored_part(rounding, name) for name in stored_shapes("w", rounding.form, (6, 384))}
    *_, (name, order) = parts.items()
    assert name == f"order.{rounding.form.order}"
    values, scales, zeros = (parts[f"w.int4{end}"].numpy() for end in ("", ".scales", ".zeros"))
    found = np.empty((6, 384))
    found[:, order] = dequantized(values, scales, 4, zeros)
    np.testing.assert_array_equal(found.astype(np.float32), part.dequantize())


@pytest.mark.parametrize("case", CASES)
def test_what_a_graph_stores_is_it_too(case) -> None:
    part, form = CASES[case]
    rounding = kept(of(part), "w", torch.float32)
    assert rounding is not None
    stored = {name: stored_part(rounding, name) for name in stored_shapes("w", form, tuple(part.values.shape))}
    assert {name: tuple(x.shape) for name, x in stored.items()} == stored_shapes("w", form, tuple(part.values.shape))
    values, scales, *others = (x.numpy() for x in stored.values())
    zeros, offsets = others.pop(0) if form.zeros else None, others.pop() if form.offsets else np.zeros_like(scales)
    found = dequantized(values, scales, form.bits, zeros) + offsets.astype(np.float64).repeat(form.block, 1)
    np.testing.assert_array_equal(found.astype(np.float32), part.dequantize())


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (Kind.Q4_0, Form(4)),
        (Kind.Q4_1, Form(4, offsets=True)),
        (Kind.Q5_0, Form(8)),
        (Kind.Q5_1, Form(8, offsets=True)),
        (Kind.Q8_0, Form(8)),
        (Kind.Q6_K, Form(8, 16)),
    ],
)
def test_kinds_of_gguf(kind, form) -> None:
    weight = np.random.default_rng(0).normal(0, 0.05, (8, 512)).astype(np.float32)
    part = blocks_of(type("Tensor", (), {"data": quantized(weight, kind), "tensor_type": kind}))
    rounding = kept(of(part), "w", torch.float32)
    assert rounding is not None
    assert rounding.form == form


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K])
def test_kinds_of_gguf_whose_scales_are_products(kind) -> None:
    part = blocks_of(type("Tensor", (), {"data": quantized(np.zeros((8, 512)), kind), "tensor_type": kind}))
    rounding = kept(of(part), "w", torch.float32)
    assert rounding is not None
    assert (rounding.bits, rounding.form.block, rounding.form.offsets) == (4 if kind == Kind.Q4_K else 8, 32, True)


@pytest.mark.parametrize(
    "part",
    [
        replace(GROUPS, groups=torch.arange(384) % 2),
        QuantizedTensor(integers(0, 16, 6, 60), scales(6, 3), None, (1, 20), 4),
        QuantizedTensor(torch.ones(6, 64).to(torch.float8_e4m3fn), scales(3, 2), None, (2, 32), 8),
    ],
    ids=["groups of other sizes", "groups of 20", "blocks of float8"],
)
def test_what_no_form_holds_is_not_kept(part) -> None:
    assert kept(of(part), "w", torch.float32) is None
    assert kept_forms(of(part), {"w": 4}, torch.float32) == {}


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (6, 1)])
def test_float8_is_kept_where_outputs_share_no_more_than_a_scale_and_it_would_be_float8_anyway(grid) -> None:
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    checkpoint = of(QuantizedTensor(values, scales(*grid), None, (6 // grid[0], 64), 8))
    assert kept_forms(checkpoint, {"w": "float8"}, torch.float32) == {"w": Form("float8", 64)}
    for width in (4, 7, 8):
        assert kept_forms(checkpoint, {"w": width}, torch.float32) == {}
    rounding = kept(checkpoint, "w", torch.float32)
    assert rounding is not None
    assert torch.equal(restored(rounding), checkpoint.read("w"))


def test_an_embedding_is_kept_without_zero_points_only() -> None:
    assert kept(of(GROUPS, EMBEDDING), EMBEDDING, torch.float32) is None
    symmetric, _ = CASES["symmetric: zero points of 8"]
    assert kept(of(symmetric, EMBEDDING), EMBEDDING, torch.float32) is not None


def test_parts_that_are_not_what_is_read_are_not_kept() -> None:
    other = replace(of(GROUPS), tensors={"w": GROUPS.dequantize() + 1})
    assert kept(other, "w", torch.float32) is None
