"""Quantized checkpoints read as the floats that they stand for, and give their parts; packed by the tests, or by others' packages."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantized_directories import LINEAR, Store, quantize
from quantized_weights import Stored, awq, float8, gptq, mxfp4
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headfold.export.bundle.inspection import inspect_path
from headfold.export.checkpoints.directories.stored import stored_tensors
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.checkpoints.quantized.mxfp4 import MXFP4
from headfold.export.checkpoints.quantized.parts import Parts
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.exportables.opening import open_exportable
from headfold.runtime.errors import HeadfoldError


def of_gptq(bits: int, size: int, symmetric: bool, version: int, act_order: bool) -> tuple[dict[str, Any], Store]:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": act_order}
    settings |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return settings, gptq(bits, size, symmetric, version, act_order)


FORMATS: dict[str, tuple[dict[str, Any], Store]] = {
    "GPTQ 4 bits, groups of 16": of_gptq(4, 16, True, 1, False),
    "GPTQ 4 bits, groups of 8": of_gptq(4, 8, False, 1, True),
    "GPTQ 8 bits, groups of 16": of_gptq(8, 16, False, 2, True),
    "GPTQ 8 bits, a scale per row": of_gptq(8, -1, False, 1, False),
    "AWQ 4 bits, groups of 16": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq(16)),
    "float8, blocks of 32 x 20": ({"quant_method": "fp8", "weight_block_size": [32, 20]}, float8((32, 20))),
    "float8, a scale per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, float8(None)),
}


@pytest.mark.parametrize("title", FORMATS)
def test_reads_the_floats_that_were_stored_exactly(title, toy_checkpoint, tmp_path) -> None:
    expected = quantize(toy_checkpoint, tmp_path / "q", *FORMATS[title])
    checkpoint, plain = open_checkpoint(tmp_path / "q"), open_checkpoint(toy_checkpoint)
    for name in plain:
        assert torch.equal(checkpoint.read(name), expected.get(name, plain.read(name))), name
        assert checkpoint.read(name).dtype == checkpoint.dtype(name)
    assert inspect_path(tmp_path / "q")["quantization"] == title


@pytest.mark.parametrize("title", FORMATS)
def test_parts_are_integers_scales_and_zero_points_by_block(title, toy_checkpoint, tmp_path) -> None:
    expected = quantize(toy_checkpoint, tmp_path / "q", *FORMATS[title])
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.quantized("model.norm.weight") is None
    for name in expected:
        part = checkpoint.quantized(name)
        assert part is not None
        assert formula(part).equal(expected[name]), name


def formula(part: QuantizedTensor) -> Tensor:
    """As the module says it, number by number."""
    result = torch.empty(part.values.shape)
    for n in range(result.shape[0]):
        for k in range(result.shape[1]):
            i = min(n // part.block[0], part.scales.shape[0] - 1)
            g = int(part.groups[k]) if part.groups is not None else k // part.block[1]
            zero = int(part.zeros[i, g]) if part.zeros is not None else 0
            result[n, k] = (float(part.values[n, k]) - zero) * part.scales[i, g].float()
    return result


COMPRESSED: dict[str, dict[str, Any]] = {  # by title: format, and the arguments of weights
    "int4, groups of 16": {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 16},
    "int4, a scale per row": {"format": "pack-quantized", "num_bits": 4, "strategy": "channel", "symmetric": False},
    "int8, groups of 8": {"format": "pack-quantized", "strategy": "group", "group_size": 8, "symmetric": False},
    "int4, a scale per tensor": {"format": "pack-quantized", "num_bits": 4, "strategy": "tensor", "symmetric": False},
    "int4, groups of 8": {"format": "int-quantized", "num_bits": 4, "strategy": "group", "group_size": 8},
    "int8, a scale per row": {"format": "int-quantized", "strategy": "channel"},
    "float8, a scale per row": {"format": "float-quantized", "type": "float", "strategy": "channel"},
    "float8, a scale per tensor": {"format": "float-quantized", "type": "float", "strategy": "tensor"},
    "float8, blocks of 16 x 16": {
        "format": "float-quantized",
        "type": "float",
        "strategy": "block",
        "block_structure": [16, 16],
    },
}


@pytest.mark.parametrize("title", COMPRESSED)
def test_compressed_tensors_are_what_its_own_package_decompresses(title, toy_checkpoint, tmp_path) -> None:
    options = {"num_bits": 8, "type": "int", "symmetric": True} | COMPRESSED[title]
    format_ = options.pop("format")
    arguments = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(format_)

    def store(weight: Tensor) -> Stored:
        rows, columns = weight.shape
        size = {"group": options.get("group_size"), "block": 16}.get(options["strategy"], columns)
        grid = {"tensor": (1,), "block": (rows // 16, columns // 16)}.get(options["strategy"], (rows, columns // size))
        random = torch.Generator().manual_seed(0)
        most = 2 ** options["num_bits"] / 2 if options["type"] == "int" else 448
        state = {"weight": weight, "weight_scale": (torch.rand(grid, generator=random) + 0.5) / most}
        if not options["symmetric"]:
            state["weight_zero_point"] = torch.randint(-3, 4, grid, generator=random).to(torch.int8)
        stored = compressor.compress(state, scheme)
        floats = compressor.decompress(stored, scheme)["weight"]
        return {f".{name}": part for name, part in stored.items()} | {".input_scale": torch.ones(1)}, floats

    groups = {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}}
    settings = {"quant_method": "compressed-tensors", "format": format_, "config_groups": groups, "ignore": ["lm_head"]}
    expected = quantize(toy_checkpoint, tmp_path / "q", settings, store)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert inspect_path(tmp_path / "q")["quantization"] == f"compressed-tensors {title}"
    assert len(checkpoint.ignored) == len(expected)
    for name, floats in expected.items():
        assert torch.equal(checkpoint.read(name), floats), name
        part = checkpoint.quantized(name)
        assert part is not None
        assert formula(part).equal(floats), name


def test_float8_blocks_are_what_transformers_makes_of_them() -> None:
    parts, floats = float8((32, 20))(torch.randn(80, 50))
    theirs = _dequantize_fp8_weight(parts[".weight"], parts[".weight_scale_inv"], [32, 20], torch.float32)
    assert torch.equal(theirs, floats)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path) -> None:
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(0, 250, (3, 10, 2), dtype=torch.uint8, generator=random)  # up to what bfloat16 holds
    save_file({"e_blocks": blocks, "e_scales": scales}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    source = MXFP4().source(Parts("e", {name.removeprefix("e"): part for name, part in stored.items()}))
    assert torch.equal(source.read(), convert_moe_packed_tensors(blocks, scales))
    parts, floats = mxfp4(torch.randn(2, 64, 6, generator=random))
    assert torch.equal(convert_moe_packed_tensors(parts["_blocks"], parts["_scales"]).float(), floats)


def test_scales_and_zero_points_of_a_cache_are_left_aside(toy_checkpoint, tmp_path) -> None:
    quantize(toy_checkpoint, tmp_path / "q", *FORMATS["GPTQ 4 bits, groups of 8"])
    file = tmp_path / "q" / "model.safetensors"
    names = [f"model.layers.0.self_attn.{x}_{part}" for x in "kv" for part in ("scale", "zero_point")]
    save_file(load_file(file) | {name: torch.ones(1, dtype=torch.int8) for name in names}, file, {"format": "pt"})
    assert set(open_checkpoint(tmp_path / "q").ignored) == set(names)


UP = "model.layers.0.mlp.up_proj"


def changed(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({UP + suffix: change(t[UP + suffix]).contiguous()})


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no zero points": ("GPTQ 4 bits, groups of 8", lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.weight has no qzeros"),
    "no scales": ("GPTQ 4 bits, groups of 8", lambda t: t.pop(f"{UP}.scales"), f"{UP}.weight has no scales"),
    "no values": ("AWQ 4 bits, groups of 16", lambda t: t.pop(f"{UP}.qweight"), f"{UP}.weight has no qweight"),
    "act-order without an index": (
        "GPTQ 4 bits, groups of 8",
        lambda t: t.pop(f"{UP}.g_idx"),
        f"{UP}.weight has no g_idx",
    ),
    "fewer scales": ("GPTQ 4 bits, groups of 8", changed(".scales", lambda x: x[1:]), "scales is F16 [5, 80]"),
    "fewer columns": ("GPTQ 4 bits, groups of 8", changed(".qweight", lambda x: x[1:]), "scales is F16 [6, 80]"),
    "one axis": ("GPTQ 4 bits, groups of 8", changed(".qweight", lambda x: x.flatten()), "qweight is I32 [480]"),
    "words of 64 bits": ("GPTQ 4 bits, groups of 8", changed(".qweight", lambda x: x.long()), "qweight is I64"),
    "a group too many": ("GPTQ 4 bits, groups of 8", changed(".g_idx", lambda x: x + 1), "names groups 1 to 6, of 6"),
    "a group before the first": (
        "GPTQ 4 bits, groups of 8",
        changed(".g_idx", lambda x: x - 1),
        "groups -1 to 4, of 6",
    ),
    "there as it is, too": (
        "GPTQ 4 bits, groups of 8",
        lambda t: t.update({f"{UP}.weight": torch.ones(80, 48)}),
        f"has tensor {UP}.weight twice, quantized and as it is",
    ),
    "awq: fewer zero points": ("AWQ 4 bits, groups of 16", changed(".qzeros", lambda x: x[:, 1:]), "qzeros is I32"),
    "float8: other blocks": (
        "float8, blocks of 32 x 20",
        changed(".weight_scale_inv", lambda x: x[:, 1:]),
        "up_proj.weight_scale_inv is F32 [3, 2] instead of",
    ),
    "float8: of 16 bits": ("float8, blocks of 32 x 20", changed(".weight", lambda x: x.half()), "instead of F8_E4M3"),
    "of another model": (
        "AWQ 4 bits, groups of 16",
        lambda t: (
            t.update({n: x[:, :2].contiguous() for n, x in t.items() if n.startswith(f"{UP}.q")})
            or changed(".scales", lambda x: x[:, :16])(t)
        ),
        "1 tensor of the wrong shape",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line(case, toy_checkpoint, tmp_path) -> None:
    title, change, message = DAMAGED[case]
    quantize(toy_checkpoint, tmp_path / "q", *FORMATS[title])
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HeadfoldError) as caught:
        open_checkpoint(tmp_path / "q").read(f"{UP}.weight")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("via", ["headfold", "transformers"])
def test_biases_of_zeros_beside_quantized_weights_are_left_aside(via, toy_checkpoint, tmp_path) -> None:
    """AutoGPTQ stores one beside each weight, whatever the model has."""
    settings, store = FORMATS["GPTQ 4 bits, groups of 16"]

    def with_bias(value: float) -> Store:
        def stored(weight: Tensor) -> Stored:
            parts, floats = store(weight)
            return parts | {".bias": torch.full((len(weight),), value, dtype=torch.float16)}, floats

        return stored

    quantize(toy_checkpoint, tmp_path / "zeros", settings, with_bias(0))
    quantize(toy_checkpoint, tmp_path / "numbers", settings, with_bias(0.5))
    opened, checkpoint = open_exportable(tmp_path / "zeros", via), open_checkpoint(tmp_path / "zeros")
    assert f"{UP}.bias" in checkpoint.ignored
    read = opened.tensors(torch.float32).read
    for name in (name for name in checkpoint if LINEAR.search(name)):
        assert torch.equal(read(name), checkpoint.read(name))
    with pytest.raises(HeadfoldError, match=r"proj\.bias"):
        open_exportable(tmp_path / "numbers", via).tensors(torch.float32)


def test_a_missing_configuration_is_looked_for_where_older_tools_leave_it(toy_checkpoint, tmp_path) -> None:
    settings, store = FORMATS["GPTQ 4 bits, groups of 16"]
    quantize(toy_checkpoint, tmp_path / "q", settings, store)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadfoldError, match=r"Put what quantize_config\.json says into config\.json"):
        open_checkpoint(tmp_path / "q")


def test_compressed_tensors_in_no_order_and_of_numbers_that_have_too_many_bits(toy_checkpoint, tmp_path) -> None:
    def store(weight: Tensor) -> Stored:
        rows, columns = weight.shape
        numbers = torch.arange(weight.numel()).remainder(16).sub(8).view(rows, columns).to(torch.int8)
        index = torch.full((columns,), -1, dtype=torch.int32)
        parts = {".weight": numbers, ".weight_scale": torch.ones(rows, columns // 8), ".weight_g_idx": index}
        return parts, numbers.float()

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
    groups = {"g": {"weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    expected = quantize(toy_checkpoint, tmp_path / "q", settings, store)
    for name, floats in expected.items():
        assert torch.equal(open_checkpoint(tmp_path / "q").read(name), floats)
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight"][3, 5] = 8
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HeadfoldError, match=rf"tensor {UP}\.weight has numbers of more than 4 bits"):
        open_checkpoint(tmp_path / "q").read(f"{UP}.weight")


@pytest.mark.parametrize(("has", "lacks"), [({"symmetric": False}, "zero_point"), ({"actorder": "group"}, "g_idx")])
def test_what_a_scheme_has_is_not_left_out(has, lacks, toy_checkpoint, tmp_path) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", **has}

    def store(weight: Tensor) -> Stored:
        return {".weight": weight.to(torch.int8), ".weight_scale": torch.ones(weight.shape[0], 1)}, weight

    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"g": {"weights": weights}},
    }
    quantize(toy_checkpoint, tmp_path / "q", settings, store)
    with pytest.raises(HeadfoldError, match=rf"_proj\.weight has no {lacks}"):
        open_checkpoint(tmp_path / "q")


def test_two_schemes_that_fit_are_not_guessed_between(toy_checkpoint, tmp_path) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "group"}
    groups = {str(size): {"weights": weights | {"group_size": size}} for size in (40, 47)}

    def store(weight: Tensor) -> Stored:
        scales = torch.ones(weight.shape[0], -(-weight.shape[1] // 40))
        return {".weight": weight.to(torch.int8), ".weight_scale": scales}, weight

    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    quantize(toy_checkpoint, tmp_path / "q", settings, store)
    with pytest.raises(HeadfoldError, match="fit not one scheme of config_groups"):
        open_checkpoint(tmp_path / "q")
