"""What transformers' models are tried with: a tiny random configuration of each, odd sizes, windows shorter than the prompts.

`scripts/parity_zoo` exports and proves them all, tests take a sample.
"""

from typing import Any

_BASE: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SQUARE = {"hidden_size": 192}  # where the class wants it to be heads times head size
_GEMMA = _WINDOWS | {"query_pre_attn_scalar": 24}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}

TRIED: dict[str, dict[str, Any]] = {  # by model type: what its configuration has beside the sizes above
    "apertus": {},
    "arcee": {},
    "bitnet": _SQUARE,
    "cohere": {},
    "cohere2": _WINDOWS,
    "ernie4_5": {},
    "exaone4": _WINDOWS,
    "falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "head_dim": None,
        "hidden_size": 192,
        "alibi": False,
    },
    "gemma": {},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm": {},
    "glm4": {},
    "gpt_bigcode": {},
    "gpt_neox": {"hidden_size": 192, "rotary_pct": 0.5},
    "gpt_oss": _WINDOWS | _LOCAL_EXPERTS,
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "granitemoe": _LOCAL_EXPERTS,
    "helium": _SQUARE,
    "hunyuan_v1_dense": {},
    "jais2": {},
    "llama": {},
    "ministral": _WINDOWS,
    "mistral": {"sliding_window": 9},
    "mixtral": _LOCAL_EXPERTS,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": _EXPERTS | _SQUARE,
    "opt": {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 136, "num_attention_heads": 3},
    "persimmon": _SQUARE,
    "phi": _SQUARE,
    "phi3": {"hidden_size": 192, "sliding_window": 9},
    "phimoe": _LOCAL_EXPERTS | {"sliding_window": 9},
    "qwen2": _WINDOWS | {"use_sliding_window": True},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 56},
    "qwen3": _WINDOWS | {"use_sliding_window": True},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"hidden_size": 192, "partial_rotary_factor": 0.25},
    "starcoder2": {"hidden_size": 192, "sliding_window": 9},
    "vaultgemma": _GEMMA,
}


def configuration(model_type: str) -> dict[str, Any]:
    """The keyword arguments of its tiny configuration."""
    return {name: value for name, value in (_BASE | TRIED[model_type]).items() if value is not None}
