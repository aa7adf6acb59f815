"""What tests try, and how deeply: model types, the tiny random configuration of each (odd sizes, windows shorter than the prompts).

`scripts/parity_zoo` exports and proves them all, tests take a sample, `headfold families` lists them; README's table is made of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headfold.export.checkpoints.families import FAMILIES
from headfold.plugins.attention.schema import Attention
from headfold.runtime.manifest import Road

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
_LAST_FULL = {"sliding_window": 9, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_PER_LAYER = {"hidden_size_per_layer_input": 24, "vocab_size_per_layer_input": 331, "num_kv_shared_layers": 0}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_GEMMA = _WINDOWS | {"query_pre_attn_scalar": 24}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1}
_GROUPS = {"n_group": 2, "topk_group": 1}  # of which experts are chosen
_LATENT = {  # keys of 32, a part of them rotated and the same in all heads
    "head_dim": None,
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
}
_BOTH: tuple[Attention, ...] = ("native", "plugin")
_NO_INTERFACE = "attends by code of its own"
_STATE = "has a state beside keys and values"
_OTHER_KEYS = "attends to other keys and values than it caches"
_VALUES = "has values of size 16 and keys of size 32"


@dataclass(frozen=True)
class Tried:
    """A model type of transformers, and what was done with it; a random model of it is exported, proven and generates.

    Attributes:
        changes: of its tiny configuration, beside the sizes above; None takes one of them out.
        real: a real model of the type that tests or `scripts/real_models` export, prove and ask.
        tensorrt: ways to TensorRT whose parsed network of the random model agrees with PyTorch on a CPU.
        refused: why it does not come through; empty if it does.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    real: str = ""
    tensorrt: tuple[Attention, ...] = ()
    refused: str = ""

    @property
    def road(self) -> Road:
        """The one it takes by itself."""
        return "headfold" if self.model_type in FAMILIES else "transformers"

    def to_json(self) -> dict[str, Any]:
        """How deeply it is tried, as plain JSON types."""
        return {
            "model_type": self.model_type,
            "road": self.road,
            "random_configuration": not self.refused,
            "real_weights": self.real or None,
            "tensorrt_network": list(self.tensorrt),
            "refused": self.refused or None,
        }


TRIED: tuple[Tried, ...] = (
    Tried("afmoe", _WINDOWS | _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1}),
    Tried("apertus", tensorrt=_BOTH),
    Tried("arcee", tensorrt=_BOTH),
    Tried("aria_text", {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1}),
    Tried("biogpt", tensorrt=_BOTH),
    Tried("bitnet", _SQUARE, tensorrt=_BOTH),
    Tried("bloom", refused=_NO_INTERFACE),  # ALiBi
    Tried("codegen", {"num_attention_heads": 4, "n_ctx": 256}, refused=_NO_INTERFACE),
    Tried("cohere", tensorrt=_BOTH),
    Tried("cohere2", _WINDOWS, tensorrt=_BOTH),
    Tried("cohere2_moe", _WINDOWS | {"num_experts": 6, "num_experts_per_tok": 2}),
    Tried("cwm", _WINDOWS, tensorrt=_BOTH),
    Tried("deepseek_v2", _LATENT | _ROUTED_EXPERTS | {"v_head_dim": 16}, refused=_VALUES),
    Tried("deepseek_v3", _LATENT | _ROUTED_EXPERTS | _GROUPS | {"v_head_dim": 16}, refused=_VALUES),
    Tried("diffllama", refused=_OTHER_KEYS),
    Tried("doge", refused="computes with its attention mask"),
    Tried("dots1", _ROUTED_EXPERTS | _GROUPS | {"first_k_dense_replace": 1}),
    Tried("ernie4_5", tensorrt=_BOTH),
    Tried("ernie4_5_moe", {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40}),
    Tried("exaone4", _WINDOWS, tensorrt=_BOTH),
    Tried("exaone_moe", _WINDOWS | _EXPERTS),
    Tried("falcon", {"head_dim": None}, refused=_NO_INTERFACE),
    Tried("falcon_h1", refused=_STATE),
    Tried("flex_olmo", _SQUARE | {"num_experts": 6, "num_experts_per_tok": 2}),
    Tried("flint", _WINDOWS | _EXPERTS | {"shared_expert_intermediate_size": 56}),
    Tried("gemma", tensorrt=_BOTH),
    Tried("gemma2", _GEMMA, tensorrt=("plugin",)),
    Tried("gemma3_text", _GEMMA, real="Gemma-3-270M", tensorrt=_BOTH),
    Tried(
        "gemma4_text",
        _LAST_FULL | {"global_head_dim": 64, "num_global_key_value_heads": 3, "attention_k_eq_v": True} | _PER_LAYER,
    ),
    Tried("glm", tensorrt=_BOTH),
    Tried("glm4", tensorrt=_BOTH),
    Tried("glm4_moe", _ROUTED_EXPERTS | _GROUPS | {"first_k_dense_replace": 1}),
    Tried("glm4_moe_lite", _LATENT | _ROUTED_EXPERTS | {"v_head_dim": 32}, refused=_OTHER_KEYS),
    Tried("gpt2", tensorrt=_BOTH),
    Tried("gpt_bigcode", tensorrt=_BOTH),
    Tried("gpt_neox", {"hidden_size": 192, "rotary_pct": 0.5}, tensorrt=_BOTH),
    Tried("gpt_oss", _WINDOWS | _LOCAL_EXPERTS),
    Tried("gptj", {"rotary_dim": 16}, refused=_NO_INTERFACE),
    Tried("granite", _GRANITE, tensorrt=_BOTH),
    Tried("granite_swa", _GRANITE | _WINDOWS),
    Tried("granitemoe", _LOCAL_EXPERTS),
    Tried("granitemoe_swa", _GRANITE | _WINDOWS | _LOCAL_EXPERTS),
    Tried("granitemoeshared", _LOCAL_EXPERTS | {"shared_intermediate_size": 56}),
    Tried("helium", _SQUARE, tensorrt=_BOTH),
    Tried("hunyuan_v1_dense", tensorrt=_BOTH),
    Tried("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 2}),
    Tried("hy_v3", _EXPERTS),
    Tried("hyperclovax", tensorrt=_BOTH),
    Tried("internlm3", tensorrt=_BOTH),
    Tried("iquestcoder"),
    Tried("jais2", tensorrt=_BOTH),
    Tried("jetmoe", refused="does not run with headfold's cache, on tensors without numbers"),
    Tried("kolibri1", _WINDOWS | _EXPERTS | {"shared_expert_intermediate_size": 56}),
    Tried("laguna", _WINDOWS | _EXPERTS | {"num_attention_heads_per_layer": [6, 4, 8]}),
    Tried("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, refused=_STATE),
    Tried("llama", real="SmolLM2-135M-Instruct", tensorrt=_BOTH),
    Tried("llama4_text", {"attention_chunk_size": 9}, refused="has tokens see in a pattern of its own"),
    Tried("mamba", refused=_STATE),
    Tried("mellum", _WINDOWS | _EXPERTS),
    Tried("mimo_v2_flash", _WINDOWS | _ROUTED_EXPERTS | {"v_head_dim": 16}, refused=_VALUES),
    Tried("minicpm3", _LATENT | {"v_head_dim": 16}, refused=_VALUES),
    Tried("minimax_m2", _LOCAL_EXPERTS),
    Tried("ministral", _WINDOWS, tensorrt=_BOTH),
    Tried("ministral3", {"sliding_window": 9}),
    Tried("mistral", {"sliding_window": 9}, tensorrt=_BOTH),
    Tried("mixtral", _LOCAL_EXPERTS),
    Tried("modernbert-decoder", _SQUARE | {"local_attention": 9}, tensorrt=_BOTH),
    Tried("mpt", refused=_NO_INTERFACE),  # ALiBi
    Tried("nanochat", tensorrt=_BOTH),
    Tried("nemotron", tensorrt=_BOTH),
    Tried("olmo", tensorrt=_BOTH),
    Tried("olmo2", tensorrt=_BOTH),
    Tried("olmo3", _WINDOWS, tensorrt=_BOTH),
    Tried("olmoe", _EXPERTS | _SQUARE),
    Tried(
        "opt", {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 136, "num_attention_heads": 3}, tensorrt=_BOTH
    ),
    Tried("persimmon", _SQUARE, tensorrt=_BOTH),
    Tried("phi", _SQUARE, tensorrt=_BOTH),
    Tried("phi3", {"hidden_size": 192, "sliding_window": 9}, tensorrt=_BOTH),
    Tried("phimoe", _LOCAL_EXPERTS | {"sliding_window": 9}),
    Tried("qwen2", _WINDOWS | {"use_sliding_window": True}, tensorrt=_BOTH),
    Tried("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 56}),
    Tried("qwen3", _WINDOWS | {"use_sliding_window": True}, tensorrt=_BOTH),
    Tried("qwen3_moe", _EXPERTS),
    Tried("qwen3_next", _EXPERTS, refused=_STATE),
    Tried("seed_oss", tensorrt=_BOTH),
    Tried("smollm3", {"no_rope_layers": [1, 0, 1]}, tensorrt=_BOTH),
    Tried("solar_open", _ROUTED_EXPERTS | _GROUPS),
    Tried("stablelm", {"hidden_size": 192, "partial_rotary_factor": 0.25}, tensorrt=_BOTH),
    Tried("starcoder2", {"hidden_size": 192, "sliding_window": 9}, tensorrt=_BOTH),
    Tried("vaultgemma", _GEMMA, tensorrt=("plugin",)),
)


def configuration(model_type: str) -> dict[str, Any]:
    """The keyword arguments of its tiny configuration."""
    changes = next(row.changes for row in TRIED if row.model_type == model_type)
    return {name: value for name, value in (_BASE | dict(changes)).items() if value is not None}


def markdown() -> str:
    """README's table: types that are tried as deeply stand in one row, the deepest first."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in TRIED:
        key = (bool(row.refused), not row.real, not row.tensorrt, row.road, row.real, row.tensorrt, row.refused)
        alike.setdefault(key, []).append(row.model_type)
    lines = [
        "| model types | road | random model | real weights | TensorRT network |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (*_, road, real, tensorrt, refused), names in sorted(alike.items()):
        cells = [", ".join(sorted(names)), road, refused or "proven", real, ", ".join(tensorrt)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(line.replace("|  ", "| ") for line in lines)
