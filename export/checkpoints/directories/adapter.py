"""A LoRA adapter, as peft saves it, over the tensors of its base. What would change the model in another way is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, PositiveInt, ValidationError

from headfold.export.checkpoints.directories.lora import LowRank
from headfold.export.checkpoints.directories.stored import EMBEDDING, FLOATS, HEAD, Source, Stored, tensors_of
from headfold.export.checkpoints.side_files import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, read_json
from headfold.runtime.errors import CheckpointError, ConfigError

_OTHER_BASE = "Name the directory it was trained on: --base DIR."
_MERGE = "Merge it with peft, and export the result."
_PARTS = {  # what names of tensors end in, behind their module, and what they are in LoRA
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_PREFIX = "base_model.model."
_UNREAD = (  # of peft's LoraConfig: each makes another model, where it is not empty
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
_KEEPS_BASE = {True, False, None, "gaussian", "eva", "orthogonal"}  # initializations that leave the base as it was
_ENDLESS = re.compile(r"\)[*+{?]|\\\d|\(\?|([*+{][^*+{]*){3}")  # patterns that can take for ever


class LoraSettings(BaseModel, frozen=True):
    """peft's LoraConfig: what merging needs of it."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: PositiveInt = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}


def one_tensor(path: Path) -> CheckpointError:
    """An adapter at `path` that changes one of two that are tied."""
    return CheckpointError(
        "changes the embedding or the head, and in its base they are one tensor",
        where=path,
        fix="Merge it with peft, which must say what becomes of the other, and export the result.",
    )


@dataclass(frozen=True)
class Adapter:
    """An adapter's directory: its settings, and its tensors by module and part, or by name where they take the place of the base's."""

    path: Path
    settings: LoraSettings
    pairs: Mapping[str, Mapping[str, Stored]]
    whole: Mapping[str, Stored]

    @property
    def title(self) -> str:
        """What a person calls it."""
        ranks = sorted({pair["a"].shape[0] for pair in self.pairs.values() if "a" in pair and pair["a"].shape})
        return f"{'DoRA' if self.settings.use_dora else 'LoRA'} of rank {', '.join(map(str, ranks)) or self.settings.r}"

    def over(self, base: Mapping[str, Source]) -> dict[str, Source]:
        """The base's tensors, this adapter merged into those that it changes; nothing is read.

        Raises:
            CheckpointError: it is for another base.
        """
        tensors = dict(base)
        for name, stored in self.whole.items():
            if name == HEAD and HEAD not in base and EMBEDDING in base:  # of a base that stores the tied pair once
                self._name_in(base, EMBEDDING, stored.shape)
                tensors[HEAD] = stored
            else:
                tensors[self._name_in(base, name, stored.shape)] = stored
        for module, pair in self.pairs.items():
            if f"{module}.weight" == HEAD and HEAD not in base and EMBEDDING in base:
                raise one_tensor(self.path)
            name = self._name_in(base, f"{module}.weight", None)
            tensors[name] = self._merged(module, pair, tensors[name])
        return tensors

    def changes(self, module: str) -> bool:
        """Whether it changes a module, whose name ends so."""
        names = [*self.pairs, *(name.rpartition(".")[0] for name in self.whole)]
        return any(name.endswith(module) for name in names)

    def _name_in(self, base: Mapping[str, Source], name: str, shape: tuple[int, ...] | None) -> str:
        for known in (name, f"model.{name}", name.removeprefix("model.")):  # of the model with its head or without
            if known in base and shape in {None, base[known].shape}:
                return known
            if known in base:
                raise CheckpointError(
                    f"its {name} is {list(shape or ())}, and that of its base {list(base[known].shape)}",
                    where=self.path,
                    fix=_OTHER_BASE,
                )
        raise CheckpointError(f"it changes {name}, which its base does not have", where=self.path, fix=_OTHER_BASE)

    def _merged(self, module: str, pair: Mapping[str, Stored], base: Source) -> LowRank:
        a, b, settings = pair.get("a"), pair.get("b"), self.settings
        embedding = a is not None and a.name.endswith("lora_embedding_A")
        if a is None or b is None or settings.use_dora != ("magnitude" in pair):
            part = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
            raise CheckpointError(
                f"{module} has {'no' if part != 'lora_magnitude_vector' or settings.use_dora else 'a'} {part}",
                where=self.path,
                fix="Save the adapter again.",
            )
        if embedding and settings.use_dora:
            raise ConfigError(f"{module} is an embedding with DoRA", where=self.path, fix=_MERGE)
        rank = int(self._of(module, settings.rank_pattern, settings.r))
        turned = embedding or settings.fan_in_fan_out
        rows, columns = (base.shape[::-1] if turned else base.shape) if len(base.shape) == 2 else (-1, -1)
        wanted = {"a": (rank, columns), "b": (rows, rank)}
        for part, shape in wanted.items():
            if pair[part].shape != shape:
                raise CheckpointError(
                    f"tensor {pair[part].name} is {list(pair[part].shape)} instead of {list(shape)}, for a base of {list(base.shape)}",
                    where=self.path,
                    fix=_OTHER_BASE,
                )
        magnitude = pair.get("magnitude")
        if magnitude is not None and math.prod(magnitude.shape) != rows:
            magnitude.of((int(rows),), magnitude.kind)
        for stored in pair.values():
            stored.of(stored.shape, *FLOATS)
        alpha = self._of(module, settings.alpha_pattern, settings.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        return LowRank(base, a, b, scaling, turned, magnitude)

    def _of(self, module: str, patterns: Mapping[str, float], default: float) -> float:
        """peft's `get_pattern_key`: the first pattern that the end of a module's name is."""
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def is_adapter(directory: Path) -> bool:
    """Whether there is an adapter and no model of its own."""
    return (directory / ADAPTER_CONFIG).is_file() and not any((directory / name).is_file() for name in (SINGLE, INDEX))


def open_adapter(directory: Path) -> Adapter:
    """The adapter in a directory.

    Raises:
        ConfigError: it is of a kind that is not merged here.
        CheckpointError: it is damaged, or a pickle.
    """
    settings = _settings(read_json(directory / ADAPTER_CONFIG), directory)
    if not (directory / ADAPTER).is_file():
        pickle = (directory / "adapter_model.bin").is_file()
        what = "has only adapter_model.bin, and pickles are never loaded: they can run any code"
        raise CheckpointError(
            what if pickle else f"has no {ADAPTER}",
            where=directory,
            fix="Save it again with peft, which writes safetensors.",
        )
    pairs, whole = dict[str, dict[str, Stored]](), dict[str, Stored]()
    for name, stored in tensors_of(directory / ADAPTER).items():
        inner = name.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _PARTS if inner.endswith(suffix)), None)
        if suffix is not None:
            pairs.setdefault(inner.removesuffix(suffix), {})[_PARTS[suffix]] = stored
        elif "lora_" in inner:
            raise CheckpointError(f"tensor {name} is not one of LoRA's", where=directory / ADAPTER, fix=_MERGE)
        else:  # of `modules_to_save`, an embedding saved along, or a bias
            whole[inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = stored.of(
                stored.shape, *FLOATS
            )
    if not pairs and not whole:
        raise CheckpointError("has no tensors", where=directory / ADAPTER, fix="Save the adapter again.")
    return Adapter(directory, settings, pairs, whole)


def _settings(content: Mapping[str, Any], directory: Path) -> LoraSettings:
    where = directory / ADAPTER_CONFIG
    if content.get("peft_type") != "LORA":
        raise ConfigError(
            f"is an adapter of type {content.get('peft_type')!r}", where=where, fix=f"headfold merges LORA. {_MERGE}"
        )
    given = [name for name in _UNREAD if content.get(name)]
    if given:
        raise ConfigError(
            f"{given[0]} is {content[given[0]]!r}, which headfold does not merge", where=where, fix=_MERGE
        )
    first = content.get("init_lora_weights")
    if not isinstance(first, str | bool | None) or first not in _KEEPS_BASE:
        raise ConfigError(f"init_lora_weights is {first!r}, which changes the base too", where=where, fix=_MERGE)
    empty = {"rank_pattern": content.get("rank_pattern") or {}, "alpha_pattern": content.get("alpha_pattern") or {}}
    try:
        settings = LoraSettings.model_validate({**content, **empty})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{field} is {problem['input']!r}: {problem['msg']}", where=where, fix="Save the adapter again."
        ) from error
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{pattern!r} is no pattern: {error}", where=where, fix="Save the adapter again."
            ) from error
        if _ENDLESS.search(pattern):
            raise ConfigError(
                f"{pattern!r} is a pattern that can take for ever", where=where, fix="Name the modules in full."
            )
    return settings
