"""Which format a `quantization_config` names, in whatever spelling; and what is not read is refused by name."""

import shutil
from typing import Any

import pytest
import torch
from quantized_directories import configure, quantize
from quantized_weights import gptq
from safetensors.torch import load_file, save_file

from headfold.export.bundle.inspection import inspect_checkpoint
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.checkpoints.quantized.awq import AWQ
from headfold.export.checkpoints.quantized.compressed_tensors import Weights
from headfold.export.exportables.opening import open_exportable
from headfold.runtime.errors import HeadfoldError


@pytest.mark.parametrize("via", ["headfold", "transformers"])
@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "hqq", None])
def test_a_left_over_configuration_is_of_no_tensor(method, via, toy_checkpoint, tmp_path) -> None:
    """Also one that is not read: whoever dequantized the tensors left it."""
    shutil.copytree(toy_checkpoint, tmp_path / "q")
    configure(tmp_path / "q", quantization_config={"quant_method": method, "bits": 3})
    assert "quantization" not in inspect_checkpoint(open_exportable(tmp_path / "q", via))


@pytest.mark.parametrize("settings", [{"format": "gptq_v2"}, {"format": "GPTQ_V2", "checkpoint_format": "gptq_v2"}])
def test_newer_settings_name_the_second_version_otherwise(settings, toy_checkpoint, tmp_path) -> None:
    """Its zero points are stored as they are; those of the first version less one."""
    settings |= {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    floats = quantize(toy_checkpoint, tmp_path / "q", settings, gptq(4, 16, False, 2, False))
    read = open_checkpoint(tmp_path / "q")
    for name, expected in floats.items():
        assert torch.equal(read.read(name), expected)


def test_older_settings_of_awq() -> None:
    named = AWQ.model_validate({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"})
    assert named == AWQ(bits=4, group_size=64)


def test_spellings_of_compressed_tensors_own_package() -> None:
    blocks = Weights.model_validate({"strategy": "BLOCK", "type": "FLOAT", "block_structure": "128x64"})
    assert blocks.block(256, 256) == (128, 64)
    assert Weights.model_validate({"num_bits": 4, "strategy": None, "group_size": -1}).block(80, 48) == (1, 48)
    assert Weights.model_validate({"strategy": None}).block(80, 48) == (80, 48)
    assert Weights.model_validate({"actorder": "GROUP", "group_size": 32}).ordered


METHODS = ["bitsandbytes", "hqq", "aqlm", "exl2", "quanto", "eetq", "torchao", "vptq", "bitnet", "nvfp4", "auto-round"]
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
UNREAD: dict[str, tuple[Any, str]] = {
    **{name: ({"quant_method": name}, f"its weights are quantized ({name}), which") for name in METHODS},
    "no method": ({"bits": 4}, "names no quant_method"),
    "no object": (["gptq"], "names no quant_method"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "(gptq) with bits 3"),
    "no bits": ({"quant_method": "gptq"}, "(gptq) with bits: Field required"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "marlin in newer settings": (
        {"quant_method": "gptq", "bits": 4, "format": "marlin"},
        "(gptq) with format 'marlin'",
    ),
    "two layouts": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"},
        "(gptq) with format 'gptq_v2': Value error, checkpoint_format is 'gptq'",
    ),
    "gemv in newer settings": ({"quant_method": "awq", "format": "gemv"}, "(awq) with format 'gemv'"),
    "groups of 0": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "(gptq) with group_size 0: "),
    "groups that no integer holds": ({"quant_method": "awq", "bits": 4, "group_size": 10**20}, "group_size 1000"),
    "blocks that no integer holds": (
        {"quant_method": "fp8", "weight_block_size": [128, 10**20]},
        "weight_block_size.1 1",
    ),
    "modules of other bits": ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 8}}}, "dynamic"),
    "marlin, said another way": (
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        "is_marlin_format True",
    ),
    "no zero points": ({"quant_method": "awq", "zero_point": False}, "(awq) with zero_point False"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "(awq) with version 'gemv'"),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
        "format 'nvfp4-pack-quantized'",
    ),
    "sparse": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"g": {"weights": CHANNEL}},
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        "'sparse-24-bitmask' is not read",
    ),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "(fp8) with fmt 'e5m2'"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_named(case, toy_checkpoint, tmp_path) -> None:
    settings, message = UNREAD[case]
    shutil.copytree(toy_checkpoint, tmp_path / "q")
    configure(tmp_path / "q", quantization_config=settings)
    packed = load_file(tmp_path / "q" / "model.safetensors") | {"packed": torch.ones(2, dtype=torch.int32)}
    save_file(packed, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadfoldError) as caught:
        open_checkpoint(tmp_path / "q")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_floats_of_bitnet_are_not_what_it_computes_with(toy_checkpoint, tmp_path) -> None:
    shutil.copytree(toy_checkpoint, tmp_path / "q")
    configure(tmp_path / "q", quantization_config={"quant_method": "bitnet", "linear_class": "autobitlinear"})
    with pytest.raises(HeadfoldError, match=r"its weights are quantized \(bitnet\), which headfold does not read"):
        open_checkpoint(tmp_path / "q")
