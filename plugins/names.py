"""Names of a graph's inputs and outputs, as the ecosystem spells them, and of cache scales. Plain text; nothing here needs anything.

`input_ids`, `attention_mask`, `past_key_values.{i}.key|value` → `logits`, `present.{i}.key|value`, and `hidden_states` if asked for.
"""

PARTS = ("key", "value")  # of a layer's cache
HIDDEN_STATES = "hidden_states"  # the output of what the head is given: the residual stream after the last norm
_PAST, _PRESENT = "past_key_values", "present"


def cache_input(layer: int | str, part: str) -> str:
    """The graph input that holds a layer's keys or values of the tokens so far."""
    return f"{_PAST}.{layer}.{part}"


def cache_output(layer: int | str, part: str) -> str:
    """The graph output that holds them with the new tokens."""
    return f"{_PRESENT}.{layer}.{part}"


def caches(num_hidden_layers: int) -> dict[str, str]:
    """Every cache input and its output, layer by layer, keys first."""
    return {cache_input(i, part): cache_output(i, part) for i in range(num_hidden_layers) for part in PARTS}


def is_cache_input(name: str | None) -> bool:
    """Whether a tensor is a cache input."""
    return name is not None and name.startswith(f"{_PAST}.")


def is_cache_output(name: str | None) -> bool:
    """Whether a tensor is a cache output."""
    return name is not None and name.startswith(f"{_PRESENT}.")


def input_of(output: str) -> str:
    """The cache input that a cache output is given to in the next step."""
    return _PAST + output.removeprefix(_PRESENT)


def scale_name(layer: int, part: str) -> str:
    """The initializer that holds a layer's cache scales; `part` is one of SCALES."""
    return f"model.layers.{layer}.self_attn.{part}"


def hidden_state(layer: int) -> str:
    """The residual stream after a layer: a value inside the graph."""
    return f"hidden_states.{layer}"


def is_hidden_state(name: str | None) -> bool:
    """Whether a value is the residual stream after a layer."""
    return name is not None and name.startswith("hidden_states.")


def layer_of_output(name: str) -> int | None:
    """The layer whose residual stream or cache an output is; None of all others."""
    stem, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if stem in (_PRESENT, HIDDEN_STATES) and rest else None


def layer_input(layer: int) -> str:
    """What a layer reads of the residual stream, where it is judged alone; that of the number behind the last is the final norm's."""
    return f"layer_input.{layer}"
