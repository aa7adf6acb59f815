"""What everything behind an Exportable knows of a model: sizes, and how each layer attends. Plain numbers, for a manifest too."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from headfold.runtime.errors import ConfigError


@dataclass(frozen=True)
class LayerFacts:
    """How one layer attends, in the words of `headfold.plugins.attention.schema.Attributes`."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    window: int = -1  # a token sees itself and the window - 1 tokens before it; -1: all of them
    softcap: float = 0.0  # 0: none
    sinks: bool = False


@dataclass(frozen=True)
class Facts:
    """Sizes are counts of elements; `capacity` is in tokens, the most that the model was made for."""

    model_type: str
    vocab_size: int
    hidden_size: int
    capacity: int
    layers: tuple[LayerFacts, ...]
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """Per layer the number of key/value heads, and their size."""
        return [(layer.num_key_value_heads, layer.head_dim) for layer in self.layers]

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Facts":
        """The inverse of `to_json`.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        try:
            layers = tuple(LayerFacts(**layer) for layer in content["layers"])
            eos = tuple(content["eos_token_id"])
            return Facts(**{**content, "layers": layers, "eos_token_id": eos})
        except (KeyError, TypeError) as error:
            known = ", ".join(field.name for field in fields(Facts))
            raise ConfigError(f"facts of a model are not {known}: {error}", fix="Export the bundle again.") from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return asdict(self) | {
            "layers": [asdict(layer) for layer in self.layers],
            "eos_token_id": list(self.eos_token_id),
        }
