"""Why a model of transformers cannot be exported, said so that a person knows what to do; transformers itself says it in pages."""

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from headfold.export.exportables.transformers_road.loading import one_line
from headfold.runtime.errors import ConfigError

ROAD = "headfold exports what transformers can run with another attention, every layer with keys and values of its own."
BELONGS = "The checkpoint is incomplete, or config.json is another model's."
_ATTENDS = "attends by code of its own (with ALiBi?), not through transformers' AttentionInterface"
_OF_LENGTH = ("dynamic", "longrope")
_LANGUAGE_MODEL = "Save its language model alone: model.language_model and its head, as a causal language model."


def unreadable(error: Exception, path: Path) -> ConfigError:
    """A configuration that transformers does not read."""
    text = str(error)
    if "trust_remote_code" in text:
        what, fix = "the model is code of its own, beside its weights", "Give --trust-remote-code if you trust it."
    elif "does not recognize this architecture" in text:
        what, fix = f"transformers cannot read its configuration: {one_line(error)}", "Upgrade transformers."
    else:
        what, fix = f"transformers cannot read its configuration: {one_line(error)}", "Correct config.json."
    return ConfigError(what, where=path, fix=fix)


def refuse_other_kinds(config: PreTrainedConfig, path: Path) -> None:
    """Raise ConfigError of what is no decoder of text to transformers."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise ConfigError(f"{name} has an encoder", where=path, fix="headfold exports decoders.")
    auto_map = getattr(config, "auto_map", None)  # as it stands in config.json: of any type
    own = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    if not own and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        composite = config.get_text_config() is not config
        fix = _LANGUAGE_MODEL if composite else "headfold exports decoders of text."
        raise ConfigError(f"{name} is no causal language model in transformers", where=path, fix=fix)


def refuse_rope_of_length(config: PreTrainedConfig, path: Path) -> None:
    """Raise ConfigError of a RoPE whose angles depend on how long the text is by now: keys that are cached would have to change."""
    said = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [part for part in said.values() if isinstance(part, dict)]  # some have one for each kind of layer
    for rope in (said, *each):
        if rope.get("rope_type") in _OF_LENGTH:
            raise ConfigError(
                f"its RoPE ({rope['rope_type']}) depends on the length of the text",
                where=path,
                fix="headfold exports RoPE that does not, as default, linear, llama3 or yarn.",
            )


def unmade(config: PreTrainedConfig, error: Exception, path: Path) -> ConfigError:
    """A model that cannot be made with headfold's attention."""
    says = str(error).lower()  # of a class that has no AttentionInterface, or of a dictionary of its own
    if isinstance(error, ValueError | KeyError) and ("headfold" in says or "attention" in says):
        return ConfigError(f"{config.model_type} {_ATTENDS}: {one_line(error)}", where=path, fix=ROAD)
    return ConfigError(
        f"no {config.model_type} can be made of its configuration: {one_line(error)}", where=path, fix=BELONGS
    )


def unattending(model: PreTrainedModel, layer: int, path: Path) -> ConfigError:
    """A model whose layer is silent."""
    config = model.config
    if config.get_text_config() is not config:
        what, fix = f"{config.model_type} is more than a decoder of text", _LANGUAGE_MODEL
    else:
        what, fix = (
            f"layer {layer} of {config.model_type} does not attend through transformers' AttentionInterface",
            ROAD,
        )
    return ConfigError(what, where=path, fix=fix)


def unrun(model: PreTrainedModel, error: Exception, path: Path) -> ConfigError:
    """A model whose code fails without a cache or mask of its own kind."""
    name = model.config.model_type
    if not type(model)._can_set_attn_implementation():
        return ConfigError(f"{name} {_ATTENDS}", where=path, fix=ROAD)
    return ConfigError(
        f"{name} does not run with headfold's cache, on tensors without numbers: {one_line(error)}",
        where=path,
        fix=ROAD,
    )


def other_class(config: PreTrainedConfig) -> str:
    """What to do about tensors that do not fit: told by the class whose weights they are."""
    named = getattr(config, "architectures", None)  # as it stands in config.json: of any type
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    classes = [name for name in classes if not name.endswith("ForCausalLM")]
    if not classes or classes[0].endswith("LMHeadModel"):
        return BELONGS
    return f"They are of a {classes[0]}, which is no causal language model."
