"""GGUF files of random models of transformers, written with the gguf package's own writer and names, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

Tensors = dict[str, np.ndarray]


def gguf_tensors(model: PreTrainedModel, architecture: str) -> Tensors:
    """By name; norms of Gemma have 1 added, gate and up of experts are two tensors."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    found: Tensors = {}
    for name, parameter in model.named_parameters():  # what is tied comes once
        values = parameter.detach().numpy()
        layer = name.partition("layers.")[2].partition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, 1)  # [E, I, H]
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            found[f"blk.{layer}.ffn_down_exps.weight"] = values
        else:
            stem, _, kind = name.rpartition(".")
            called = names.get_name(stem)
            assert called is not None, name
            found[f"{called}.{kind}"] = values + 1 if architecture.startswith("gemma") and "norm" in name else values
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """The metadata that every decoder has; `config` is headfold's or one of transformers, which call them alike."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, tensors: Tensors, **metadata: float) -> Path:
    """Write it without a tokenizer; `metadata` adds numbers under the architecture's name."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    add_sizes(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture}.{name.replace('__', '.')}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
