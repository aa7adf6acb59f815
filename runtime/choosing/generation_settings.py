"""What a bundle's generation_config.json asks for, in transformers' names. What headfold does not do is named, not dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from headfold.runtime.choosing.restrictions import Restrictions
from headfold.runtime.choosing.sampling import SAMPLING, check_parameter
from headfold.runtime.errors import BundleError
from headfold.runtime.files.json_file import SETTINGS_BYTES, read_object

FILE = "generation_config.json"
_FIX = "Correct the checkpoint's file, and export again."
# fmt: off
_HARMLESS = frozenset({  # change no token here: about caches, outputs, speed, beams, encoders, or the file itself
    "_from_model_config", "transformers_version", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "use_mtp", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "early_stopping", "length_penalty",
    "renormalize_logits", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "remove_invalid_values",
})
# fmt: on
_OFF = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0, "penalty_alpha": 0}
_OFF |= {"guidance_scale": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
_SAMPLING_ONLY = frozenset({"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"})


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON written by others has 8192.0
Count = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]


class GenerationSettings(BaseModel):
    """The file's fields; null is the same as absent."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    eos_token_id: Whole | list[Whole] | None = None
    bos_token_id: Whole | None = None
    pad_token_id: Whole | list[Whole] | None = None
    do_sample: bool | None = None
    temperature: Any = None  # this and the next four are judged where they are used
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    max_new_tokens: Positive | None = None
    max_length: Positive | None = None  # prompt and answer
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    stop_strings: str | list[str] | None = None
    suppress_tokens: list[Whole] | None = None
    begin_suppress_tokens: list[Whole] | None = None
    bad_words_ids: list[list[Whole]] | None = None
    no_repeat_ngram_size: Count | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The tokens that end an answer, or None where the file names none."""
        return _tokens(self.eos_token_id)

    @property
    def pad_token_ids(self) -> tuple[int, ...] | None:
        """The tokens that pad, the first one first, or None where the file names none."""
        return _tokens(self.pad_token_id)

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings or []

    @property
    def restrictions(self) -> Restrictions:
        """What it forbids."""
        return Restrictions(
            suppress_tokens=tuple(self.suppress_tokens or ()),
            begin_suppress_tokens=tuple(self.begin_suppress_tokens or ()),
            bad_words_ids=tuple(map(tuple, self.bad_words_ids or ())),
            no_repeat_ngram_size=self.no_repeat_ngram_size or 0,
            min_length=self.min_length or 0,
            min_new_tokens=self.min_new_tokens or 0,
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """Temperature and the like where it has them. Those of a greedy file that no sampler takes mean nothing: they are left out."""
        values = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        if not self.do_sample:
            values = {name: value for name, value in values.items() if check_parameter(name, value) is None}
            values["temperature"] = 0.0
        return {"temperature": 1.0} | values

    @property
    def ignored(self) -> list[str]:
        """The fields that would change an answer in transformers, and do not here."""
        extra: Mapping[str, Any] = self.model_extra or {}
        harmless = _HARMLESS if self.do_sample else _HARMLESS | _SAMPLING_ONLY
        return sorted(
            name for name, value in extra.items() if name not in harmless and value and value != _OFF.get(name, False)
        )


def _tokens(ids: int | list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def read_generation_settings(directory: Path) -> GenerationSettings:
    """The settings of a bundle, all absent where it has no such file.

    Raises:
        BundleError: the file is no JSON object, or a field is not of the kind that it must be.
    """
    path = directory / FILE
    if not path.is_file():
        return GenerationSettings()
    content = read_object(path, SETTINGS_BYTES, BundleError, _FIX)
    try:
        return GenerationSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise BundleError(f"{field} is {content[field]!r}: {first['msg']}", where=path, fix=_FIX) from error
