"""Rounding of weights: against the definition, and against gguf's own quantization."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.exportables.rounded import RoundedCheckpoint, StoredTensors
from headfold.export.model.config import ModelConfig
from headfold.export.model.rounding import (
    Form,
    as_rounded,
    bits_of,
    form_of,
    holds,
    restored,
    rounded,
    suits_narrow_scales,
)
from headfold.export.model.storing import packed
from headfold.plugins.quantized.reference import dequantized

CONFIG = ModelConfig(  # of no model: what rounds does not look at it
    model_type="llama",
    vocab_size=1,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=1,
)


def weight(rows: int = 6, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_is_within_half_a_step_of_its_weight(bits) -> None:
    w = weight()
    rounding = rounded(w, bits)
    values, scales = rounding.values, rounding.scales
    error = (restored(rounding) - w).abs().view(6, 3, 32)
    step = scales.abs()[..., None]
    assert values.int().min() >= -(1 << bits - 1)
    assert values.int().max() < 1 << bits - 1
    clipped = (values.view(6, 3, 32) == (1 << bits - 1) - 1) & (
        bits == 4
    )  # there is no +8: such a weight loses up to a step
    assert (error <= step * (0.5 + 0.5 * clipped) * (1 + 1e-5)).all()


@pytest.mark.parametrize("numbers", [1, 200, 400])  # one row of 96 numbers, two, and four of six
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_a_large_weight_is_rounded_in_parts(bits, numbers, monkeypatch) -> None:
    w = weight()
    whole = rounded(w, bits, torch.float16)
    assert holds(whole, restored(whole))
    monkeypatch.setattr("headfold.export.model.rounding._AT_A_TIME", numbers)
    parts = rounded(w, bits, torch.float16)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(as_rounded(w, bits, torch.float16), restored(whole))
    assert holds(whole, restored(whole))
    for row in (0, 5):
        off = restored(whole)
        off[row, 3] += 1e-3
        assert not holds(whole, off)


@pytest.mark.parametrize(("columns", "blocks"), [(96, {32: 32, 128: 32}), (576, {64: 64, 128: 64}), (1536, {128: 128})])
def test_blocks_are_as_large_as_divide_a_row(columns, blocks) -> None:
    for asked, size in blocks.items():
        rounding = rounded(weight(2, columns), 8, block=asked)
        assert rounding.form == form_of(8, columns, asked) == Form(8, size)
        largest = weight(2, columns).view(2, -1, size).abs().amax(-1)
        torch.testing.assert_close(rounding.scales, largest / 127)


def test_blocks_of_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        assert not restored(rounded(torch.zeros(2, 64), bits)).any()


@pytest.mark.parametrize(("bits", "kind"), [(8, gguf.GGMLQuantizationType.Q8_0), (4, gguf.GGMLQuantizationType.Q4_0)])
def test_what_gguf_holds_in_these_bits_is_kept_bit_for_bit(bits, kind) -> None:
    held = gguf.quants.dequantize(gguf.quants.quantize(weight(64, 128).numpy(), kind), kind)  # [64, 128]
    again = restored(rounded(torch.from_numpy(held), bits))
    np.testing.assert_array_equal(again.numpy(), held)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_numbers_are_those_that_the_kernel_reads(bits) -> None:
    values = rounded(weight(), bits).values
    bytes_ = packed(values, bits).numpy()
    assert bytes_.shape == (6, 12 * bits)
    numbers = np.stack((bytes_ & 15, bytes_ >> 4), -1).reshape(6, 96) if bits == 4 else bytes_.reshape(6, 96)
    np.testing.assert_array_equal(numbers.astype(int) - (1 << bits - 1), values.numpy())


def test_matrices_with_whole_blocks_are_rounded_and_the_head_and_embedding_to_eight_bits() -> None:
    shapes = {
        "model.embed_tokens.weight": (9, 64),
        "a": (8, 32),
        "b": (8, 48),
        "norm": (32,),
        "lm_head.weight": (9, 64),
    }
    assert bits_of(shapes, "int4") == {"model.embed_tokens.weight": 8, "a": 4, "lm_head.weight": 8}
    assert set(bits_of(shapes, "int8").values()) == {8}


def test_a_graph_stores_values_and_scales_under_names_of_their_own() -> None:
    q, norm = weight(4, 64), torch.ones(64)
    rounding = RoundedCheckpoint(MemoryCheckpoint(Path("memory"), CONFIG, {"q": q, "norm": norm}), {"q": Form(4)})
    stored = StoredTensors(rounding)
    assert stored.shapes() == {"norm": (64,), "q.int4": (4, 2, 16), "q.int4.scales": (4, 2)}
    found = dequantized(*(stored.read(name).numpy() for name in ("q.int4", "q.int4.scales")), 4)
    np.testing.assert_array_equal(found.astype(np.float32), rounding.read("q"))
    assert stored.read("norm") is norm


def test_float16_holds_scales_that_are_not_too_small_in_any_row() -> None:
    w = weight(64, 64)
    assert suits_narrow_scales(w)
    assert suits_narrow_scales(torch.cat((w, torch.zeros(8, 64))))
    assert not suits_narrow_scales(w * 1e5)
    one_small = w.clone()
    one_small[5, 32:] *= 1e-5  # the rest of the matrix is as it was
    assert not suits_narrow_scales(one_small)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_small_block_stays_one_where_float16_has_hardly_a_scale_for_it(bits) -> None:
    """Within a step of the smallest scale, and not all zeros, as a scale of 1 would have it."""
    w = weight(6, 96) * torch.tensor([1, 1e-4, 1e-6, 1e-7, 1e-8, 0])[:, None]
    found = rounded(w, bits, torch.float16)
    step = 2.0**-24
    scales = found.scales.abs()
    assert ((scales == 1) == (w.reshape(6, -1, 32).abs().amax(-1) == 0)).all()
    off = (restored(found) - w).abs().reshape(6, -1, 32)
    most = 0.5 if bits == 8 else 1  # of four bits -8 to 7, whose extreme is at one end
    assert (off <= scales[..., None] * (most + 2**-9) + step * 2 ** (bits - 1)).all()
    assert (found.values[3] != 0).any()
