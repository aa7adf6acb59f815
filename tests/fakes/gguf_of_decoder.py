"""GGUF files of headfold's own decoders, written with the gguf package's writer, as llama.cpp's converter does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_of_transformers import add_sizes

Kind = gguf.GGMLQuantizationType
_SCALES = {
    Kind.Q4_K: ((0, 1e-4), (2, 8e-4)),
    Kind.Q5_K: ((0, 5e-5), (2, 8e-4)),
    Kind.Q6_K: ((208, 5e-5),),
    Kind.IQ4_NL: ((0, 8e-4),),
}  # where, and how large
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base in NAMES:
        return f"{NAMES[base]}.{kind}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows (LlamaModel.permute), with indices instead of reshapes."""
    size = weight.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write(
    path: Path,
    checkpoint: Any,
    architecture: str,
    kind_of: Callable[[str], Kind] = lambda _: Kind.F32,
    **metadata: Any,
) -> Path:
    """Write it without a tokenizer. `kind_of` says how matrices are stored, by the decoder's names; `metadata` adds numbers."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, architecture)
    add_sizes(writer, config)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    if config.rope.rope_type != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.rope_type))
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    for name, value in metadata.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name in checkpoint:
        weight = checkpoint.read(name).numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = interleave(
                weight, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        kind = kind_of(name) if weight.ndim == 2 else Kind.F32
        if kind != Kind.F32 and weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(gguf_name(name), quantized(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """The blocks of a weight [N, K], uint8 [N, bytes]; random ones, around 0.05, of kinds that the gguf package does not write."""
    if kind not in _SCALES:
        return gguf.quants.quantize(weight, kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(weight.size)
    blocks = rng.integers(0, 256, (weight.size // numbers, size), dtype=np.uint8)
    for start, scale in _SCALES[kind]:
        halves = (scale * rng.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, start : start + 2] = halves[:, None].view(np.uint8)
    return blocks.reshape(len(weight), -1)
