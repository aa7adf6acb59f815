"""The road of whatever transformers loads: its own module traced into our op, its loader's weights, its eager attention as oracle.

Only in this folder the export imports transformers, the extra `headfold[transformers]`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.checkpoints.directories.directory import Directory, check_copy
from headfold.export.checkpoints.directories.stored import EMBEDDING, HEAD
from headfold.export.checkpoints.hf_tensors import HARMLESS, adds_nothing
from headfold.export.checkpoints.tokenizer_of_parts import with_tokenizer
from headfold.export.exportables.base import Changed, Master, Tensors, no_quantized_cache
from headfold.export.exportables.facts import Facts, LayerFacts
from headfold.export.exportables.foreign.traced import ModelTensors, OnePass, TracedMaster
from headfold.export.exportables.foreign.widening import is_large, widened
from headfold.export.exportables.oracle import Oracle
from headfold.export.exportables.transformers_road import experts
from headfold.export.exportables.transformers_road.attending import NAME, OpCache
from headfold.export.exportables.transformers_road.loading import load_model, quiet, stored_dtype, with_linear
from headfold.export.exportables.transformers_road.refusals import (
    BELONGS,
    ROAD,
    other_class,
    refuse_other_kinds,
    refuse_rope_of_length,
    unattending,
    unmade,
    unreadable,
    unrun,
)
from headfold.export.exportables.transformers_road.transformers_oracle import TransformersOracle, decoder_layers
from headfold.export.model.config import MOST_POSITIONS
from headfold.export.model.numbers import check_numbers
from headfold.plugins.dtypes import Quantized
from headfold.runtime.errors import CheckpointError, ConfigError
from headfold.runtime.manifest import Road


class Load(Protocol):
    """Makes a model with eager attention, its weights in a dtype; those without `values` are on the meta device."""

    def __call__(self, dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
        """The model, new each time."""
        ...


_NO_TEXT = "Take `text_config`, `decoder` and the like out of config.json, or give the model type that has it."
_SHARED = 2  # parameters made of one that is stored, at most; those that are missing are named when they are read


class TransformersModel:
    """An Exportable of a transformers decoder.

    Args:
        config: of the model.
        load: makes the model with its weights; called anew for tensors and for the oracle.
        path: where it came from, for messages.
        tokenizer: the files to pass on.
        directory: that the weights are read from; None for a model in memory.

    Raises:
        ConfigError: its attention cannot become headfold's op; which module, and why, is named.
    """

    road: Road = "transformers"

    def __init__(
        self,
        config: PreTrainedConfig,
        load: Load,
        path: Path,
        tokenizer: TokenizerFiles,
        directory: Directory | None = None,
    ) -> None:
        self.config, self.path, self.tokenizer, self.directory = config, path, tokenizer, directory
        self._load, self._stored = load, stored_dtype(directory) if directory is not None else None
        refuse_rope_of_length(config, path)
        model = on_meta(config, torch.float32, path)
        self.shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}  # what is tied counts once
        self.facts = _facts(model, path)

    def load(self, dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
        """See Load; as it is traced, with nothing but linear products."""
        return with_linear(self._load(dtype, values))

    @property
    def titles(self) -> Mapping[str, str]:
        """See Exportable."""
        return self.directory.titles if self.directory is not None else {}

    def describe(self) -> dict[str, Any]:
        """See Exportable."""
        return self.facts.to_json()

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """See Exportable."""
        if cache is not None:
            raise no_quantized_cache(self.path)
        model, layers = on_meta(self.config, dtype, self.path), self.facts.layers
        return TransformersMaster(model, len(layers), all_logits, layers)

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """See Exportable."""
        return ModelTensors(self.load(self._stored or dtype), self.path)

    def tables(self, dtype: torch.dtype, capacity: int) -> Mapping[str, Tensor]:
        """See Exportable: none; buffers come with the weights."""
        return {}

    def oracle(self, stored: torch.dtype, capacity: int, weights: Changed | None = None) -> Oracle:
        """See Exportable."""
        return self.reference(stored, capacity, torch.float32, weights)

    def reference(
        self, stored: torch.dtype, capacity: int, arithmetic: torch.dtype, weights: Changed | None = None
    ) -> Oracle:
        """See Exportable; transformers computes norms and softmax in float32 at most."""
        made = self.directory.made if self.directory is not None else ""
        large = is_large(sum(map(math.prod, self.shapes.values())))
        model = self.load(self._stored or stored if large else stored)
        model = widened(model, decoder_layers(model, len(self.facts.layers)), arithmetic, stored, weights)
        return TransformersOracle(model, made=made)


class TransformersMaster(TracedMaster):
    """A transformers decoder with the graph's inputs and outputs; see Master.

    What its layers see is `known`, but for a pass without caches, which learns it.
    """

    def __init__(
        self, model: PreTrainedModel, num_hidden_layers: int, all_logits: bool, known: Sequence[LayerFacts] = ()
    ) -> None:
        layers = decoder_layers(model, num_hidden_layers)
        super().__init__(model, layers, model.get_output_embeddings(), all_logits)
        self._layers, self._known = num_hidden_layers, known

    def logits(self, input_ids: Tensor, positions: Tensor, cache: OnePass) -> Tensor:
        """See TracedMaster."""
        caches = OpCache(self._layers, cache, self._known)
        with caches.running():
            output = self.decoder(
                input_ids=input_ids, attention_mask=None, position_ids=positions, past_key_values=caches, use_cache=True
            )
        return cast(Tensor, output.logits)


def open_transformers(path: Path, trust_remote_code: bool = False, base: Path | None = None) -> TransformersModel:
    """Open a directory that transformers loads, or an adapter over one; `base` is the adapter's, where it names another.

    Raises:
        CheckpointError: it is incomplete, damaged, or not safetensors.
        ConfigError: transformers does not know the model, or headfold cannot export it.
    """
    if not path.is_dir():
        raise CheckpointError(
            "is no file or directory", where=path, fix="Name a Hugging Face directory or a GGUF file."
        )
    directory = Directory(path, base)
    elements = sum(math.prod(source.shape) for source in directory.tensors.values())
    config = _config(directory.place, trust_remote_code)
    check_numbers(config.to_dict(), directory.place)  # it spells them in other ways, too
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(directory.tensors):  # before they are made
        raise ConfigError(f"it has {layers} layers, and {len(directory.tensors)} tensors", where=path, fix=BELONGS)
    if config.get_text_config().tie_word_embeddings:
        directory.check_tied()
        if HEAD in directory.tensors and EMBEDDING in directory.tensors:
            check_copy(directory.tensors[HEAD], directory.tensors[EMBEDDING], path)

    def load(dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
        model, found = load_model(directory, config, dtype, trust_remote_code, values)
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            names = sorted(key if isinstance(key, str) else key[0] for key in found[what])
            if what == "unexpected_keys":
                names = [n for n in names if not (HARMLESS.search(n) or adds_nothing(n, directory.tensors))]
            if names:
                raise CheckpointError(
                    f"{what.replace('_keys', '')} tensors: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                    where=path,
                    fix=other_class(config),
                )
        return model

    tokenizer = TokenizerFiles(with_tokenizer(directory.tokenizer, directory.config, path))
    opened = TransformersModel(config, load, path, tokenizer, directory)
    for name, source in directory.tensors.items():
        if name in opened.shapes and not source.dtype.is_floating_point:  # transformers would take them for floats
            kind = str(source.dtype).removeprefix("torch.")
            raise CheckpointError(f"tensor {name} is of {kind}, and no float", where=path, fix=BELONGS)
    parameters = sum(map(math.prod, opened.shapes.values()))
    if parameters > _SHARED * elements:  # before transformers takes memory for them
        raise CheckpointError(f"it has {parameters:,} parameters, and its files {elements:,}", where=path, fix=BELONGS)
    return opened


def _config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Transformers' configuration of the model that the weights are when they are read: not quantized."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a configuration's own validation raises
        raise unreadable(error, path) from error
    if not isinstance(config.get_text_config(), PreTrainedConfig):  # transformers takes any attribute of such a name
        raise ConfigError("what it gives as the configuration of its text model is none", where=path, fix=_NO_TEXT)
    refuse_other_kinds(config, path)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def on_meta(config: PreTrainedConfig, dtype: torch.dtype, path: Path) -> PreTrainedModel:
    """The model without weights, its attention and experts the ops'."""
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME, experts_implementation=experts.NAME
            )
    except Exception as error:  # of a class that has no AttentionInterface, of a model's own code
        raise unmade(config, error, path) from error
    with _found_in(path):
        experts.learn_gates(model)
    return with_linear(cast(PreTrainedModel, model.eval().requires_grad_(False)))


def _facts(model: PreTrainedModel, path: Path) -> Facts:
    """Learned from a pass on meta tensors, so they are what the model does, not what its configuration seems to say."""
    config = model.config
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    if getattr(type(model), "_is_stateful", False):
        raise ConfigError(f"{config.model_type} has a state beside keys and values", where=path, fix=ROAD)
    master, pad = TransformersMaster(model, count, all_logits=True), text.pad_token_id
    # Models look for it among the tokens, which are no numbers yet, only to warn; some configurations let no one set it to None
    vars(text)["pad_token_id"] = None
    with torch.device("meta"):
        ids = torch.zeros(1, 3, dtype=torch.long)
        try:
            with _found_in(path):
                _, cache, hidden = master.run(ids, torch.ones_like(ids), None)
        except Exception as error:  # whatever a model's own code raises when it finds no cache or mask of its own kind
            if isinstance(error, ConfigError) and type(model)._can_set_attn_implementation():
                raise
            raise unrun(model, error, path) from error
    silent = [layer for layer in range(count) if layer not in cache.facts]
    if silent or len(hidden) != count:
        raise unattending(model, silent[0] if silent else len(hidden), path)
    capacity = getattr(text, "max_position_embeddings", None)
    if isinstance(capacity, int) and capacity > MOST_POSITIONS:
        fix = f"It must be at most {MOST_POSITIONS}."
        raise ConfigError(f"max_position_embeddings is {capacity}", where=path, fix=fix)
    if not isinstance(capacity, int) or capacity < 1:
        raise ConfigError(
            "config.json has no max_position_embeddings", where=path, fix="Add it: the most tokens the model can have."
        )
    head = model.get_output_embeddings().weight
    eos = text.eos_token_id if text.eos_token_id is not None else ()
    return Facts(
        model_type=config.model_type,
        vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        capacity=capacity,
        layers=tuple(cache.facts[layer] for layer in range(count)),
        bos_token_id=text.bos_token_id,
        eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        pad_token_id=pad,
    )


@contextmanager
def _found_in(path: Path) -> Iterator[None]:
    """What is refused inside the block says of which checkpoint it is."""
    try:
        yield
    except ConfigError as error:
        where = f"{path}: {error.where}" if error.where else path
        raise ConfigError(error.what, where=where, fix=error.fix) from error
