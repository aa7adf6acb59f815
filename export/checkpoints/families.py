"""One table per model family: how its `config.json` and its GGUF metadata spell what ModelConfig says.

A new family is one `Family`. Nothing falls back to Llama: a model type, activation or RoPE kind that is not here is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from headfold.export.model.config import MOST_LAYERS, Activation, ModelConfig, RopeConfig
from headfold.runtime.errors import ConfigError, located

Json = Mapping[str, Any]
T = TypeVar("T")
_MOST_ENDS = 64  # end tokens

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
ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # what a config.json of ours says of each type
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "attention_factor",
    ),
}


@dataclass(frozen=True)
class Family:
    """What sets a family apart. A flag that is a string is the field of `config.json` that decides."""

    architecture: str  # transformers' class
    gguf: str | None  # architecture name in GGUF files
    defaults: Mapping[str, Any]  # of transformers' configuration class, where they are not those of `_DEFAULTS`
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding_window: bool = False  # all layers have it, if sliding_window is not null, or those that layer_types names
    layer_types: bool = False  # Qwen: use_sliding_window, max_window_layers, layer_types
    never_null: str = ""  # of num_key_value_heads and head_dim the one that must be a number
    gguf_permuted: bool = False  # llama.cpp stores query and key rows for interleaved RoPE


# What a field is where config.json does not have it; null is something else. From transformers 5's configuration classes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_LLAMA: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        _LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 2048},
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        gguf_permuted=True,
    ),
    "mistral": Family(  # its GGUF files say llama
        "MistralForCausalLM",
        None,
        _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        sliding_window=True,
        never_null="num_key_value_heads",
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _QWEN, qkv_bias=True, layer_types=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _QWEN | {"head_dim": 128},
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        layer_types=True,
        never_null="head_dim",
    ),
}
OWN = "headfold"  # the model type of models that no family can express: its config.json is ModelConfig itself
_TYPES = {"full_attention", "sliding_attention"}


class NotInTable(ConfigError):
    """A model has no table, or its family's has no place for what the configuration asks for; transformers may run it."""


def config_from_json(content: Json, where: object) -> ModelConfig:
    """Read a Hugging Face `config.json` as transformers 5 does; `where` is named in errors.

    Raises:
        NotInTable: it is for transformers.
        ConfigError: a field is of the wrong type, or asks for something headfold does not implement.
    """
    with located(where):
        return _config_from_json(content)


class _Fields:
    """Typed access to a JSON object: a field that is absent has its default, a wrong one is an error that names it."""

    def __init__(self, content: Json, defaults: Json, prefix: str = "") -> None:
        self.content, self.defaults, self.prefix = content, defaults, prefix

    def get(self, name: str, kind: type[T]) -> T:
        """A field that cannot be null."""
        value = self.optional(name, kind)
        if value is None:
            said = "null" if name in self.content else "missing"
            raise ConfigError(f"{self.prefix}{name} is {said}", fix="Take the config.json that belongs to the weights.")
        return value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """A field that can be null, or absent without a default."""
        value: Any = self.content[name] if name in self.content else self.defaults.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and kind is float:
            value = float(value)
        elif number and kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ConfigError(f"{self.prefix}{name} is {value!r}", fix=f"It must be of type {kind.__name__}.")
        return value


def _config_from_json(content: Json) -> ModelConfig:
    model_type = content.get("model_type")
    if model_type == OWN:
        return ModelConfig.from_json(content)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = f"headfold knows {', '.join(FAMILIES)}."
        if isinstance(model_type, str):
            raise NotInTable(f"headfold has no table of model_type {model_type!r}", fix=known)
        said = f"{model_type!r} is unknown" if "model_type" in content else "is missing"
        raise ConfigError(f"model_type {said}", fix=known)
    family = FAMILIES[model_type]
    fields = _Fields(content, {**_DEFAULTS, **family.defaults})
    heads, hidden, layers = (fields.get(n, int) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim, kv_heads = (fields.optional(name, int) for name in ("head_dim", "num_key_value_heads"))
    if family.never_null:
        fields.get(family.never_null, int)
    if head_dim is None and hidden % max(heads, 1):
        raise ConfigError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}", fix="Set head_dim.")
    window, windowed = _sliding(fields, family, layers)
    positions = fields.get("max_position_embeddings", int)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_or(kv_heads, heads),
        head_dim=_or(head_dim, hidden // max(heads, 1)),
        max_position_embeddings=positions,
        norm_eps=fields.get("rms_norm_eps", float),
        hidden_act=activation(fields.get("hidden_act", str)),
        rope=_rope(content, positions),
        qkv_bias=_flag(family.qkv_bias, fields),
        output_bias=_flag(family.output_bias, fields),
        mlp_bias=_flag(family.mlp_bias, fields),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=windowed,
        tie_word_embeddings=fields.get("tie_word_embeddings", bool),
        bos_token_id=fields.optional("bos_token_id", int),
        eos_token_id=_ends(fields),
        pad_token_id=fields.optional("pad_token_id", int),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _ends(fields: _Fields) -> tuple[int, ...]:
    value = fields.content.get("eos_token_id")
    if not isinstance(value, list):
        single = fields.optional("eos_token_id", int)
        return () if single is None else (single,)
    if len(value) > _MOST_ENDS:
        raise ConfigError(f"eos_token_id has {len(value)} tokens", fix=f"It can have up to {_MOST_ENDS}.")
    each = _Fields({f"eos_token_id[{i}]": token for i, token in enumerate(value)}, {})
    return tuple(each.get(name, int) for name in each.content)


def activation(name: str) -> Activation:
    """Transformers' name to ours; raises NotInTable for one that we do not implement."""
    if name not in ACTIVATIONS:
        raise NotInTable(f"hidden_act {name!r} is not implemented", fix=f"headfold knows {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _flag(flag: bool | str, fields: _Fields) -> bool:
    return fields.get(flag, bool) if isinstance(flag, str) else flag


def _sliding(fields: _Fields, family: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers that have it."""
    types = fields.content.get("layer_types")
    if not (family.sliding_window or family.layer_types):
        if types is not None and (not isinstance(types, list) or len(types) != layers):  # so transformers, too
            raise ConfigError(f"layer_types is {types!r}", fix=f"It must name {layers} layers, or be removed.")
        return None, ()
    switched = family.layer_types and not fields.get("use_sliding_window", bool)
    window = fields.optional("sliding_window", int) if not switched else None
    if family.sliding_window and window is None and "layer_types" in fields.content:
        raise ConfigError(
            "there are layer_types, and sliding_window is null: transformers does not run such a model",
            fix="Remove layer_types if no layer has a window.",
        )
    if types is None:
        first = fields.get("max_window_layers", int) if family.layer_types else 0
        return window, tuple(range(max(first, 0), min(layers, MOST_LAYERS))) if window is not None else ()
    if not isinstance(types, list) or len(types) != layers or not all(kind in _TYPES for kind in types):
        raise ConfigError(
            f"layer_types is {types!r}", fix=f"It must name {' or '.join(sorted(_TYPES))} {layers} times."
        )
    sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if sliding and window is None:
        raise ConfigError(
            "layer_types names sliding layers, and there is no window", fix="Set use_sliding_window and sliding_window."
        )
    return window if sliding else None, sliding


def _rope(content: Json, positions: int) -> RopeConfig:
    """`rope_scaling` of transformers 4, which people also add to newer files by hand, before `rope_parameters` of transformers 5."""
    parameters = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(f"rope parameters are {parameters!r}", fix="They must be an object of numbers.")
    top = {k: content[k] for k in ("rope_theta", "partial_rotary_factor") if content.get(k) is not None}
    merged = top | dict(parameters)
    kind: Any = merged.get("rope_type", merged.get("type", "default"))
    if kind not in (*ROPE_FIELDS,):
        refusal = NotInTable if isinstance(kind, str) else ConfigError
        raise refusal(f"rope_type {kind!r} is not implemented", fix=f"headfold knows {', '.join(ROPE_FIELDS)}.")
    if content.get("original_max_position_embeddings") is not None:  # beside the object, it wins
        merged["original_max_position_embeddings"] = content["original_max_position_embeddings"]
    given = _Fields(merged, {"rope_theta": 10000.0, "original_max_position_embeddings": positions}, "rope: ")
    partial = given.optional("partial_rotary_factor", float)
    if partial not in (None, 1.0):
        if kind != "default":
            raise ConfigError(
                f"partial_rotary_factor is {partial} with {kind} RoPE: transformers does not run that in this family",
                fix="Take a model type that has it.",
            )
        raise NotInTable(
            f"partial_rotary_factor is {partial}, which transformers ignores in this family, and vLLM heeds",
            fix="Remove it, or take a model type that has it; headfold export goes by way of transformers.",
        )
    values: dict[str, Any] = {}
    if kind in ("linear", "llama3"):
        values["factor"] = given.get("factor", float)
    if kind == "llama3":
        values |= {name: given.get(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = original = given.get("original_max_position_embeddings", int)
    if kind == "yarn":
        if "factor" not in merged:
            raise ConfigError("rope: factor is missing", fix="Take the config.json that belongs to the weights.")
        values["factor"] = given.optional("factor", float) or positions / max(original, 1)
        values |= {name: given.optional(name, float) or 0.0 for name in ("mscale", "mscale_all_dim")}
        values["beta_fast"] = given.optional("beta_fast", float) or 32.0
        values["beta_slow"] = given.optional("beta_slow", float) or 1.0
        values["attention_factor"] = given.optional("attention_factor", float)
        values["truncate"] = bool(merged.get("truncate", True))
    return RopeConfig(rope_theta=given.get("rope_theta", float), rope_type=kind, **values)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers 5 loads; for a model no family can express, ModelConfig's own fields."""
    family = FAMILIES.get(config.model_type)
    if family is None or config.rope.partial_rotary_factor != 1:  # which these families have not
        return config.to_json() | {"model_type": OWN}
    rope = {"rope_type": config.rope.rope_type, "rope_theta": config.rope.rope_theta}
    names = ROPE_FIELDS[config.rope.rope_type]
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
    sliding = set(config.sliding_layers)
    kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(config.num_hidden_layers)]
    if family.sliding_window or family.layer_types:
        content["sliding_window"] = config.sliding_window
    if family.layer_types:
        content["use_sliding_window"] = bool(sliding)
    if family.layer_types or 0 < len(sliding) < len(kinds):
        content["layer_types"] = kinds
    return content
