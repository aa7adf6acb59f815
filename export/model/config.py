"""The configuration of a decoder: everything the model file needs to know, in Hugging Face's names, and nothing else.

Reading a family's `config.json` or GGUF metadata into it is the job of `headfold.export.checkpoints`. Contradictions raise ConfigError.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from headfold.runtime.errors import ConfigError

Activation = Literal["relu", "gelu", "gelu_pytorch_tanh", "silu", "sigmoid", "linear"]
Norm = Literal["rms_norm", "layer_norm"]
RopeType = Literal["default", "linear", "llama3", "yarn"]
MOST_LAYERS = 1024
MOST_POSITIONS = 1 << 30
MOST_FLOAT = float.fromhex("0x1.fffffep127")  # float32's, in which models compute
_MOST = {  # of each size: nothing is reckoned or allocated for a model that nobody has
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": MOST_POSITIONS,
}
_LARGEST = 1 << 31  # windows are 32-bit attributes
_NOT_OURS = frozenset({"architectures", "dtype", "torch_dtype"})  # beside ModelConfig in a config.json

# Shazeer 2020, equations 1-6: the activation of the first projection, and whether a second one multiplies it.
FEED_FORWARDS: dict[str, tuple[Activation, bool]] = {
    "ReLU": ("relu", False),
    "GELU": ("gelu", False),
    "Swish": ("silu", False),
    "GLU": ("sigmoid", True),
    "Bilinear": ("linear", True),
    "ReGLU": ("relu", True),
    "GEGLU": ("gelu", True),
    "SwiGLU": ("silu", True),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, share of each head that is rotated, and the scaling of long contexts.

    `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`, `beta_fast`, `beta_slow`, `mscale`,
    `mscale_all_dim`, `truncate` and `attention_factor` mean what they mean in transformers; each is read only by the types that
    have it.
    """

    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts of elements; `head_dim` is per head; epsilons are absolute."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Norm = "rms_norm"
    norm_eps: float = 1e-6
    hidden_act: Activation = "silu"
    gated: bool = True
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    output_bias: bool = False  # of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys, before RoPE
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    sliding_layers: tuple[int, ...] = ()  # the layers that have the window, by index
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}", fix=f"It must be 1 to {most}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}",
                fix="Every key/value head must serve the same number of query heads.",
            )
        if not 0 <= self.norm_eps <= MOST_FLOAT:
            raise ConfigError(f"norm_eps is {self.norm_eps}", fix="It must be 0 or more, and finite in float32.")
        self._check_rope()
        if self.sliding_layers and self.sliding_window is None:
            raise ConfigError("sliding-attention layers without a sliding_window", fix="Set sliding_window.")
        if self.sliding_window is not None and not 1 <= self.sliding_window < _LARGEST:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}", fix="It must be 1 or more, in 31 bits, or null."
            )

    def _check_rope(self) -> None:
        rope = self.rope
        for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(rope, name)
            if not 0 < value <= MOST_FLOAT:
                raise ConfigError(f"rope: {name} is {value}", fix="It must be positive, and finite in float32.")
        for name in ("mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor"):
            value = getattr(rope, name)
            if value is not None and not abs(value) <= MOST_FLOAT:
                raise ConfigError(f"rope: {name} is {value}", fix="It must be finite in float32.")
        if rope.rope_type in ("llama3", "yarn") and not 1 <= rope.original_max_position_embeddings < _LARGEST:
            raise ConfigError(
                f"rope: original_max_position_embeddings is {rope.original_max_position_embeddings}",
                fix="It must be 1 or more, in 31 bits.",
            )
        if rope.rope_type == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
            raise ConfigError("rope: low_freq_factor and high_freq_factor are equal", fix="The second must be larger.")
        if rope.rope_type == "yarn" and rope.rope_theta == 1:
            raise ConfigError("rope: rope_theta is 1", fix="It must be another number: YaRN divides by its logarithm.")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"head_dim {self.head_dim} x partial_rotary_factor {rope.partial_rotary_factor} rotates "
                f"{self.rotary_dim} dimensions",
                fix="RoPE rotates pairs: the number must be even and at least 2.",
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE rotates; the rest pass through."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def feed_forward(self) -> str:
        """The name of the feed-forward in Shazeer 2020; GELU's tanh approximation counts as GELU."""
        act = "gelu" if self.hidden_act == "gelu_pytorch_tanh" else self.hidden_act
        names = {variant: name for name, variant in FEED_FORWARDS.items()}
        return names.get((act, self.gated), f"{act} ({'gated' if self.gated else 'plain'})")

    @property
    def attention(self) -> str:
        """MHA, GQA or MQA, by the number of key/value heads."""
        if self.num_key_value_heads == self.num_attention_heads:
            return "MHA"
        return "MQA" if self.num_key_value_heads == 1 else "GQA"

    def window(self, layer: int) -> int:
        """The sliding window of a layer in tokens, -1 when it sees everything before it."""
        return self.sliding_window if self.sliding_window is not None and layer in self.sliding_layers else -1

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_json`; what transformers adds to a `config.json` of ours is not read.

        Raises:
            ConfigError: a field is missing, unknown, of the wrong type, or names an activation, norm or RoPE kind that does not exist.
        """
        values = {name: value for name, value in content.items() if name not in _NOT_OURS}
        try:
            rope = RopeConfig(**values.pop("rope", {}))
            lists: dict[str, Any] = {name: tuple(values.pop(name, ())) for name in ("eos_token_id", "sliding_layers")}
            config = ModelConfig(rope=rope, **lists, **values)
        except TypeError as error:
            reason = str(error).rpartition("__init__() ")[2]
            raise ConfigError(reason, fix="Take the configuration that belongs to the weights.") from error
        _check_types(rope)
        _check_types(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return asdict(self) | {"eos_token_id": list(self.eos_token_id), "sliding_layers": list(self.sliding_layers)}


def _check_types(config: ModelConfig | RopeConfig) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(
                f"{name} {value!r} is not implemented", fix=f"headfold knows {', '.join(get_args(hint))}."
            )
        if not _is(value, hint):
            raise ConfigError(f"{name} is {value!r}", fix="Take the configuration that belongs to the weights.")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is what a field's annotation says; a whole number is a float, too, a truth value is no number."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return value in choices
    if get_origin(hint) is tuple:
        return all(_is(item, choices[0]) for item in value)
    if choices:
        return any(_is(value, choice) for choice in choices)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
