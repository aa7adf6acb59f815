"""GGUF files, in: metadata becomes a ModelConfig, tensors are dequantized one at a time and renamed to the decoder's names.

Names and metadata keys are those of the GGUF specification (ggml/docs/gguf.md).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headfold.export.checkpoints.base import check_tensors
from headfold.export.checkpoints.families import FAMILIES, NotInTable
from headfold.export.checkpoints.gguf.blocks import blocks_of
from headfold.export.checkpoints.gguf.reading import FLOATS, GGUFFile, makes_sense
from headfold.export.checkpoints.gguf.tokenizer import tokenizer_files
from headfold.export.checkpoints.gguf.vocabulary import SpecialTokens
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.model.config import ModelConfig, RopeConfig
from headfold.runtime.errors import ConfigError, located

_LAYER = {  # GGUF name inside `blk.{i}.`: the decoder's name inside `model.layers.{i}.`
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata that changes what a model computes, which nothing here reads, and what it is where it changes nothing
_UNREAD: Mapping[str, Collection[float]] = {
    "attention.causal": {1},
    "attention.clamp_kqv": {0},
    "attention.max_alibi_bias": {0},
    "attention.scale": {0},
    "attn_logit_softcapping": {0},
    "embedding_scale": {0, 1},
    "final_logit_softcapping": {0},
    "logit_scale": {0, 1},
    "residual_scale": {0, 1},
    "rope.scaling.attn_factor": {1},
    "rope.scaling.yarn_attn_factor": {1},
    "rope.scaling.yarn_beta_fast": {32},
    "rope.scaling.yarn_beta_slow": {1},
    "rope.scaling.yarn_ext_factor": {-1, 1},
    "rope.scaling.yarn_log_multiplier": {0},
}
_ELSEWHERE = "Export from the Hugging Face directory of the model."
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFCheckpoint:
    """A GGUF file; see `headfold.export.checkpoints.base.Checkpoint`.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not exactly those of the model.
        ConfigError: its architecture or a feature of it is not implemented.
    """

    ignored = ()

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, GGUFFile(path)
        tensors, metadata = self._file.tensors, self._file.metadata
        with makes_sense(path):
            self.config = _config(path, metadata, tensors)
            self.tokenizer = tokenizer_files(path, metadata, self.config.max_position_embeddings)
        named = {_decoder_name(name): tensor for name, tensor in tensors.items()}
        self._shapes = expected_shapes(self.config)
        check_tensors(path, self._shapes, {name: tuple(int(n) for n in t.shape[::-1]) for name, t in named.items()})
        self._tensors = {name: named[name] for name in self._shapes}
        self.titles = self._file.titles

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint: float32 for quantized tensors."""
        return FLOATS.get(self._tensors[name].tensor_type, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """See Checkpoint.

        Raises:
            CheckpointError: the `gguf` package cannot dequantize the tensor.
        """
        values = self._file.dequantized(self._tensors[name]).reshape(self._shapes[name])
        values = self._in_order(name, values)
        values = values if values.flags.writeable else values.copy()
        return torch.from_numpy(values).to(self.dtype(name))

    def quantized(self, name: str) -> QuantizedTensor | None:
        """See Checkpoint."""
        part = blocks_of(self._tensors[name])
        if part is None:
            return None
        values, scales, offsets = (
            torch.from_numpy(self._in_order(name, x.numpy())) if x is not None else None
            for x in (part.values, part.scales, part.offsets)
        )
        assert values is not None
        assert scales is not None
        return replace(part, values=values, scales=scales, offsets=offsets)

    def kind(self, name: str) -> str | None:
        """See Checkpoint."""
        kind = self._tensors[name].tensor_type
        return None if kind in FLOATS else str(kind.name)

    def _in_order(self, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Undo llama.cpp's reordering of query and key rows, where the family has it."""
        config = self.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        found = heads.get(name.split(".")[-2]) if FAMILIES[config.model_type].gguf_permuted else None
        return rows if found is None else _unpermute(rows, found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)


def _unpermute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's rows pair neighbours where Hugging Face's pair halves."""
    pairs = values.shape[0] // heads // 2
    paired = values.reshape(heads, pairs, 2, *values.shape[1:])  # [H, D/2, 2, ...]
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def _decoder_name(name: str) -> str:
    """The decoder's name of a tensor; an unknown one keeps its own and is then reported as left over."""
    base, _, kind = name.rpartition(".")
    if base in _TOP:
        return f"{_TOP[base]}.{kind}"
    block, _, part = base.partition(".")[2].partition(".")
    if base.startswith("blk.") and part in _LAYER:
        return f"model.layers.{block}.{_LAYER[part]}.{kind}"
    return name


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    families = {family.gguf: model_type for model_type, family in FAMILIES.items() if family.gguf}
    if architecture not in families:
        raise NotInTable(
            f"headfold has no table of GGUF architecture {architecture!r}",
            where=path,
            fix=f"headfold reads {', '.join(families)}.",
        )
    family = FAMILIES[families[architecture]]

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise ConfigError(f"metadata {architecture}.{name} is missing", where=path, fix="Download the file again.")
        return value

    if "rope_freqs.weight" in tensors:
        raise ConfigError(
            "rope_freqs.weight: the scaled RoPE of this file cannot be read from GGUF",
            where=path,
            fix=_ELSEWHERE,
        )
    if get("expert_count", 0):
        raise ConfigError("it is a mixture of experts", where=path, fix="headfold exports dense models.")
    for name, neutral in _UNREAD.items():
        if (value := metadata.get(f"{architecture}.{name}")) is not None and value not in neutral:
            raise ConfigError(
                f"its metadata {architecture}.{name} is {value}, which headfold does not read",
                where=path,
                fix=_ELSEWHERE,
            )
    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", hidden // max(heads, 1)))
    if int(get("attention.value_length", head_dim)) != head_dim:
        raise ConfigError("key and value heads differ in size", where=path, fix="headfold does not export such models.")
    window = int(get("attention.sliding_window", 0)) or None
    layers = int(get("block_count"))
    special = SpecialTokens.read(metadata)
    with located(path):
        return ModelConfig(
            model_type=families[architecture],
            vocab_size=int(tensors["token_embd.weight"].shape[1])
            if "token_embd.weight" in tensors
            else int(get("vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(get("feed_forward_length")),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=int(get("attention.head_count_kv", heads)),
            head_dim=head_dim,
            max_position_embeddings=int(get("context_length")),
            norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
            rope=_rope(path, get, head_dim),
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            qk_norm=family.qk_norm,
            sliding_window=window,
            sliding_layers=tuple(range(layers)) if window else (),
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=special.bos,
            eos_token_id=special.ends,
            pad_token_id=special.pad,
        )


def _rope(path: Path, get: Any, head_dim: int) -> RopeConfig:
    # Both as llama.cpp has them: an older name of the factor, and what kind it is of where nothing says so
    factor = _decimal(get("rope.scaling.factor", get("rope.scale_linear", 0.0)))
    kind = get("rope.scaling.type", "linear" if factor not in {0.0, 1.0} else "none")
    if kind not in {"none", "linear", "yarn"}:
        raise ConfigError(
            f"rope scaling {kind!r} is not implemented", where=path, fix="headfold knows linear and yarn in GGUF."
        )
    rotated = int(get("rope.dimension_count", head_dim))
    theta = _decimal(get("rope.freq_base", 10000.0))
    if kind == "none":
        return RopeConfig(theta, partial_rotary_factor=rotated / head_dim)
    original = int(get("rope.scaling.original_context_length")) if kind == "yarn" else 0
    return RopeConfig(
        theta,
        kind,
        rotated / head_dim,
        factor=factor or 1.0,
        original_max_position_embeddings=original,
    )


def _decimal(value: float) -> float:
    """The number that was meant by a float32: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
