"""A small random model as checkpoints that are quantized: GGUF of many kinds, GPTQ, AWQ."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import block_models
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf_of_decoder import Kind, write
from quantized_weights import Stored, awq, gptq
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.model.decoder import Decoder

Store = Callable[[Tensor], Stored]
CONFIG = replace(block_models.CONFIG, hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=32)
KINDS = {  # as the mixtures of llama.cpp have them: keys and values are not alike
    "embed_tokens": Kind.Q4_1,
    "q_proj": Kind.Q5_0,
    "k_proj": Kind.Q5_0,
    "v_proj": Kind.Q6_K,
    "o_proj": Kind.Q4_0,
    "gate_proj": Kind.Q4_K,
    "up_proj": Kind.Q5_1,
    "down_proj": Kind.Q8_0,
}


def random_model() -> MemoryCheckpoint:
    """Not quantized."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.02 if "norm" in name else 0.06)
    return MemoryCheckpoint(Path("memory"), CONFIG, decoder.state_dict())


def in_gguf(directory: Path, **changes: Kind) -> Path:
    """Of the kinds above, but for `changes`."""
    kinds = KINDS | changes
    return write(directory / "m.gguf", random_model(), "llama", lambda name: kinds[name.split(".")[-2]])


def in_directory(settings: Mapping[str, object], store: Store) -> Callable[[Path], Path]:
    """Makes a directory of it."""

    def make(directory: Path) -> Path:
        path = directory / "quantized"
        save_hf(path, random_model(), torch.float32)
        tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
        for name in [name for name in tensors if "_proj" in name]:
            parts, _ = store(tensors.pop(name))
            tensors |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return path

    return make


def compressed(**arguments: object) -> Callable[[Path], Path]:
    """Makes a directory with weights packed by compressed-tensors' own package, with random zero points if `symmetric` is false."""
    options = QuantizationArgs(**{"num_bits": 4, "type": "int", "symmetric": True} | arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=options)

    def store(weight: Tensor) -> Stored:
        random, grid = (
            torch.Generator().manual_seed(0),
            (len(weight), weight.shape[1] // (options.group_size or weight.shape[1])),
        )
        state = {"weight": weight, "weight_scale": (torch.rand(grid, generator=random) + 0.5) / 40}
        if not options.symmetric:
            state["weight_zero_point"] = torch.randint(-3, 4, grid, generator=random).to(torch.int8)
        parts = compressor.compress(state, scheme)
        floats = compressor.decompress(parts, scheme)["weight"]
        return {f".{name}": part for name, part in parts.items()}, floats

    groups = {"group_0": {"targets": ["Linear"], "weights": options.model_dump(mode="json")}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return in_directory(settings, store)


MAKE: dict[str, Callable[[Path], Path]] = {  # in a directory
    "GGUF": in_gguf,
    "GPTQ": in_directory({"quant_method": "gptq", "bits": 4, "group_size": 64}, gptq(4, 64, False, 1, False)),
    "GPTQ in act-order": in_directory(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(4, 32, True, 1, True)
    ),
    "compressed-tensors": compressed(strategy="group", group_size=128, symmetric=False),
    "AWQ": in_directory({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq(128)),
}
