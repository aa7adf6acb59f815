"""Blocks of GGUF tensors in their parts, against the gguf package's own dequantization."""

from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf_of_decoder import Kind, quantized, write

from headfold.export.checkpoints.gguf.blocks import blocks_of
from headfold.export.checkpoints.opening import open_checkpoint

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_stand_for_the_same_floats_bit_for_bit(kind) -> None:
    weight = np.random.default_rng(0).normal(0, 0.05, (16, 512)).astype(np.float32)
    data = quantized(weight, kind)
    part = blocks_of(SimpleNamespace(data=data, tensor_type=kind))
    assert part is not None
    np.testing.assert_array_equal(part.dequantize().numpy(), gguf.quants.dequantize(data, kind))
    least = 0 if part.values.dtype == torch.uint8 else -(1 << part.bits - 1)
    assert least <= int(part.values.min()) <= int(part.values.max()) < least + (1 << part.bits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_no_number_is_read_without_a_word(kind, config, memory_checkpoint, tmp_path) -> None:
    """numpy would warn of infinity times zero, in lines of its own."""
    path = write(tmp_path / "m.gguf", memory_checkpoint(replace(config, hidden_size=256)), "llama", lambda _: kind)
    place = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_gate.weight")
    content, start = bytearray(path.read_bytes()), place.data_offset + (208 if kind == Kind.Q6_K else 0)
    content[start : start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    read, name = open_checkpoint(path), "model.layers.0.mlp.gate_proj.weight"
    with np.errstate(all="raise"):
        assert not read.read(name).isfinite().all()
        assert not read.quantized(name).scales.isfinite().all()


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_0])
def test_rows_of_queries_and_keys_are_in_the_decoders_order(kind, config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(replace(config, hidden_size=64))
    read = open_checkpoint(write(tmp_path / "m.gguf", checkpoint, "llama", lambda _: kind))
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        part = read.quantized(name)
        assert part is not None
        assert torch.equal(part.dequantize(), read.read(name))


def test_floats_and_kinds_that_are_not_known_have_no_parts(config, memory_checkpoint, tmp_path) -> None:
    read = open_checkpoint(write(tmp_path / "m.gguf", memory_checkpoint(config), "llama"))
    assert all(read.quantized(name) is None for name in read)
    unknown = np.zeros((2, 18), np.uint8)
    assert blocks_of(SimpleNamespace(data=unknown, tensor_type=Kind.IQ4_NL)) is None
