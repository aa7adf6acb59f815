"""One table per model family: how its `config.json` and its GGUF metadata spell what ModelConfig says.

A new family is one `Family`. Nothing falls back to Llama: a model type, activation or RoPE kind that is not here is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from headfold.export.model.config import Activation, ModelConfig, RopeConfig
from headfold.runtime.errors import ConfigError

Json = Mapping[str, Any]
T = TypeVar("T")

ACTIVATIONS: dict[str, Activation] = {  # transformers' names
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}
ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # what each type must have, and what it may have beside it
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor")}


@dataclass(frozen=True)
class Family:
    """What sets a family apart. A flag that is a string is the field of `config.json` that decides."""

    architecture: str  # transformers' class
    gguf: str | None  # architecture name in GGUF files
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding_window: bool = False  # all layers have it, if sliding_window is not null
    layer_types: bool = False  # Qwen: use_sliding_window, max_window_layers, layer_types
    gguf_permuted: bool = False  # llama.cpp stores query and key rows for interleaved RoPE


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", "attention_bias", "attention_bias", "mlp_bias", gguf_permuted=True),
    "mistral": Family("MistralForCausalLM", None, sliding_window=True),  # its GGUF files say llama
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, layer_types=True),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", "attention_bias", "attention_bias", qk_norm=True, layer_types=True),
}
OWN = "headfold"  # the model type of models that no family can express: its config.json is ModelConfig itself


def config_from_json(content: Json, where: object) -> ModelConfig:
    """Read a Hugging Face `config.json`, of transformers 4 or 5; `where` is named in errors.

    Raises:
        ConfigError: a field is missing or of the wrong type, or asks for something headfold does not implement.
    """
    try:
        return _config_from_json(_Fields(content))
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or where, fix=error.fix) from error


class _Fields:
    """Typed access to a JSON object: a missing or wrong field is an error that names it."""

    def __init__(self, content: Json, prefix: str = "") -> None:
        self.content, self.prefix = content, prefix

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        value = self.content.get(name)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"{self.prefix}{name} is missing", fix="Take the config.json that belongs to the weights."
                )
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.prefix}{name} is {value!r}", fix=f"It must be of type {kind.__name__}.")
        return value


def _config_from_json(fields: _Fields) -> ModelConfig:
    model_type = fields.get("model_type", str)
    if model_type == OWN:
        return ModelConfig.from_json(fields.content)
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is unknown", fix=f"headfold knows {', '.join(FAMILIES)}.")
    family, content = FAMILIES[model_type], fields.content
    if content.get("quantization_config"):
        raise ConfigError("quantization_config: quantized checkpoints are not read", fix="Take the unquantized one.")
    if content.get("pretraining_tp", 1) != 1:
        raise ConfigError("pretraining_tp is not 1", fix="headfold does not split matrices as it asks.")
    heads, hidden, layers = (fields.get(n, int) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if not content.get("head_dim") and hidden % max(heads, 1):
        raise ConfigError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}", fix="Set head_dim.")
    window, windowed = _sliding(fields, family, layers)
    eos = content.get("eos_token_id")
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=fields.get("head_dim", int, hidden // max(heads, 1)),
        max_position_embeddings=fields.get("max_position_embeddings", int),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        hidden_act=activation(fields.get("hidden_act", str)),
        rope=_rope(fields),
        qkv_bias=_flag(family.qkv_bias, fields),
        output_bias=_flag(family.output_bias, fields),
        mlp_bias=_flag(family.mlp_bias, fields),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=windowed,
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
        bos_token_id=content.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=content.get("pad_token_id"),
    )


def activation(name: str) -> Activation:
    """Transformers' name to ours; raises ConfigError for one that we do not implement."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is not implemented", fix=f"headfold knows {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _flag(flag: bool | str, fields: _Fields) -> bool:
    return fields.get(flag, bool, False) if isinstance(flag, str) else flag


def _sliding(fields: _Fields, family: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers that have it."""
    window = fields.content.get("sliding_window")
    if family.sliding_window and window is not None:
        return fields.get("sliding_window", int), tuple(range(layers))
    if not family.layer_types or not fields.get("use_sliding_window", bool, False) or window is None:
        return None, ()
    types = fields.content.get("layer_types")
    if types is None:
        first = fields.get("max_window_layers", int, layers)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise ConfigError(
            f"layer_types {sorted(unknown) or len(types)}",
            fix=f"It must name full or sliding attention {layers} times.",
        )
    return fields.get("sliding_window", int), tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")


def _rope(fields: _Fields) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4."""
    content = fields.content
    parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"rope parameters are {parameters!r}", fix="They must be an object.")
    merged = {k: content[k] for k in ("rope_theta", "partial_rotary_factor") if content.get(k) is not None} | dict(
        parameters
    )
    kind: Any = merged.get("rope_type") or merged.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise ConfigError(f"rope_type {kind!r} is not implemented", fix=f"headfold knows {', '.join(ROPE_FIELDS)}.")
    given = _Fields(merged, "rope: ")
    values: dict[str, Any] = {}
    for name in ROPE_FIELDS[kind]:
        values[name] = given.get(name, int if name.endswith("embeddings") else float)
    for name in ROPE_OPTIONAL.get(kind, ()):
        if merged.get(name) is not None:
            values[name] = given.get(name, bool if name == "truncate" else float)
    return RopeConfig(
        rope_theta=given.get("rope_theta", float, 10000.0),
        rope_type=kind,
        partial_rotary_factor=given.get("partial_rotary_factor", float, 1.0),
        **values,
    )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers 5 loads; for a model no family can express, ModelConfig's own fields."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return config.to_json()
    rope = {"rope_type": config.rope.rope_type, "rope_theta": config.rope.rope_theta}
    if config.rope.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = config.rope.partial_rotary_factor
    names = ROPE_FIELDS[config.rope.rope_type] + ROPE_OPTIONAL.get(config.rope.rope_type, ())
    rope |= {name: getattr(config.rope, name) for name in names if getattr(config.rope, name) is not None}
    eos: object = list(config.eos_token_id) if len(config.eos_token_id) > 1 else next(iter(config.eos_token_id), None)
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.hidden_act,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }
    for flag, value in ((family.qkv_bias, config.qkv_bias), (family.mlp_bias, config.mlp_bias)):
        if isinstance(flag, str):
            content[flag] = value
    if family.sliding_window:
        content["sliding_window"] = config.sliding_window
    if family.layer_types:
        sliding = set(config.sliding_layers)
        kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(config.num_hidden_layers)]
        content |= {"use_sliding_window": bool(sliding), "sliding_window": config.sliding_window, "layer_types": kinds}
    return content
