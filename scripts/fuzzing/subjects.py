"""The valid files that the inputs are made of: a small random model as a checkpoint, in shards, quantized, adapted, and as a bundle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from quantized_weights import gptq
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from toy_tokenizer import SPECIAL, toy_tokenizer

from fuzzing.templates import REAL
from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter

_CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=(0,),
)
_TOKENIZER_CONFIG = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>", "lstrip": False, "special": True},
    "pad_token": None,
    "added_tokens_decoder": {"0": {"content": "<eos>", "special": True}},
    "additional_special_tokens": SPECIAL[2:],
    "extra_special_tokens": {"image_token": "<|im_end|>"},
    "chat_template": [{"name": "default", "template": REAL[0]}, {"name": "tool_use", "template": REAL[2]}],
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
}
_GENERATION_CONFIG = {
    "eos_token_id": [0, 3],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
}
_SPECIAL_TOKENS = {
    "bos_token": {"content": "<bos>", "lstrip": False},
    "eos_token": "<eos>",
    "additional_special_tokens": SPECIAL[2:],
}


@dataclass(frozen=True)
class Subjects:
    """Directories that are valid, and what a GGUF file of the same model would hold."""

    checkpoint: Path
    shards: Path
    quantized: Path
    adapter: Path
    bundle: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, NDArray[np.float32]]


def make(directory: Path) -> None:
    """Write the directories; takes seconds."""
    directory.mkdir()
    tokenizer = toy_tokenizer(_CONFIG.vocab_size)
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(_TOKENIZER_CONFIG).encode(),
        "special_tokens_map.json": json.dumps(_SPECIAL_TOKENS).encode(),
        "generation_config.json": json.dumps(_GENERATION_CONFIG).encode(),
    }
    torch.manual_seed(0)
    tensors = Decoder(_CONFIG).eval().requires_grad_(False).state_dict()
    model = MemoryCheckpoint(Path("memory"), _CONFIG, tensors, TokenizerFiles(files))
    save_hf(directory / "checkpoint", model, torch.float32)
    save_hf(directory / "shards", replace(model, tokenizer=TokenizerFiles()), torch.float32, 30_000)
    save_hf(directory / "quantized", model, torch.float32)
    _quantize(directory / "quantized")
    _adapt(directory / "adapter", tensors)
    options, quiet = ExportOptions(verify=False), Reporter(quiet=True)
    export_bundle(open_exportable(directory / "checkpoint"), directory / "bundle", options, quiet)


def _quantize(directory: Path) -> None:
    """The linear layers of a directory, in GPTQ's form."""
    tensors, store = load_file(directory / "model.safetensors"), gptq(4, 8, False, 1, True)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, _ = store(tensors.pop(name))
        tensors |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "checkpoint_format": "gptq"}
    (directory / "config.json").write_text(json.dumps(content | {"quantization_config": settings}))


def _adapt(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """An adapter of the checkpoint that lies beside it."""
    directory.mkdir()
    pairs = {}
    for name in (name for name in tensors if name.endswith(("q_proj.weight", "down_proj.weight"))):
        module, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", tensors[name].shape
        pairs |= {f"{module}.lora_A.weight": torch.ones(4, columns), f"{module}.lora_B.weight": torch.ones(rows, 4)}
    save_file(pairs, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "../checkpoint",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 2},
        "init_lora_weights": True,
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def read(directory: Path) -> Subjects:
    """What `make` wrote."""
    checkpoint = open_exportable(directory / "checkpoint").tensors(torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, _CONFIG.num_hidden_layers)
    tensors = {}
    for name in checkpoint.shapes():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        tensors[theirs] = checkpoint.read(name).numpy()
    metadata = _metadata(Tokenizer.from_file(str(directory / "checkpoint" / "tokenizer.json")))
    places = (directory / name for name in ("checkpoint", "shards", "quantized", "adapter", "bundle"))
    return Subjects(*places, metadata, tensors)


def _metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "general.architecture": "llama",
        "llama.context_length": _CONFIG.max_position_embeddings,
        "llama.embedding_length": _CONFIG.hidden_size,
        "llama.block_count": _CONFIG.num_hidden_layers,
        "llama.feed_forward_length": _CONFIG.intermediate_size,
        "llama.attention.head_count": _CONFIG.num_attention_heads,
        "llama.attention.head_count_kv": _CONFIG.num_key_value_heads,
        "llama.attention.key_length": _CONFIG.head_dim,
        "llama.attention.value_length": _CONFIG.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": _CONFIG.rotary_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": REAL[0],
    }
