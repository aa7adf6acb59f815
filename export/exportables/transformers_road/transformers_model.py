"""The road of whatever transformers loads: its own module traced into our op, its loader's weights, its eager attention as oracle.

Only here and in `attending.py` the export imports transformers, the extra `headfold[transformers]`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.checkpoints.hf_tensors import stored_sizes
from headfold.export.checkpoints.side_files import side_files
from headfold.export.exportables.base import Master, no_quantized_cache
from headfold.export.exportables.facts import Facts
from headfold.export.exportables.oracle import Oracle
from headfold.export.exportables.traced import ModelTensors, OnePass, TracedMaster
from headfold.export.exportables.transformers_road import experts
from headfold.export.exportables.transformers_road.attending import NAME, OpCache
from headfold.export.exportables.transformers_road.refusals import (
    BELONGS,
    ROAD,
    one_line,
    other_class,
    refuse_other_kinds,
    unattending,
    unmade,
    unreadable,
    unrun,
)
from headfold.export.exportables.transformers_road.transformers_oracle import TransformersOracle, decoder_layers, quiet
from headfold.plugins.dtypes import Quantized
from headfold.runtime.errors import CheckpointError, ConfigError
from headfold.runtime.manifest import Road

Load = Callable[[torch.dtype, str], PreTrainedModel]  # in a dtype, with an attention implementation

_SHARED = 2  # parameters made of one that is stored, at most; those that are missing are named when they are read


class TransformersModel:
    """An Exportable of a transformers decoder.

    Args:
        config: of the model.
        load: makes the model with its weights; called anew for tensors and for the oracle.
        path: where it came from, for messages.
        tokenizer: the files to pass on.

    Raises:
        ConfigError: its attention cannot become headfold's op; which module, and why, is named.
    """

    road: Road = "transformers"

    def __init__(self, config: PreTrainedConfig, load: Load, path: Path, tokenizer: TokenizerFiles) -> None:
        self.config, self.path, self.tokenizer = config, path, tokenizer
        self._load = load
        model = _on_meta(config, torch.float32, path)
        self.shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}  # what is tied counts once
        self.facts = _facts(model, path)

    def describe(self) -> dict[str, Any]:
        """See Exportable."""
        return self.facts.to_json()

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """See Exportable."""
        if cache is not None:
            raise no_quantized_cache(self.path)
        return TransformersMaster(_on_meta(self.config, dtype, self.path), len(self.facts.layers), all_logits)

    def tensors(self, dtype: torch.dtype) -> ModelTensors:
        """See Exportable."""
        return ModelTensors(self._load(dtype, "eager"), self.path)

    def tables(self, dtype: torch.dtype, capacity: int) -> Mapping[str, Tensor]:
        """See Exportable: none; buffers come with the weights."""
        return {}

    def oracle(self, stored: torch.dtype, capacity: int) -> Oracle:
        """See Exportable."""
        return self.reference(stored, capacity, torch.float32)

    def reference(self, stored: torch.dtype, capacity: int, arithmetic: torch.dtype) -> Oracle:
        """See Exportable; transformers computes norms and softmax in float32 at most."""
        return TransformersOracle(self._load(stored, "eager").to(arithmetic))


class TransformersMaster(TracedMaster):
    """A transformers decoder with the graph's inputs and outputs; see Master."""

    def __init__(self, model: PreTrainedModel, num_hidden_layers: int, all_logits: bool) -> None:
        layers = decoder_layers(model, num_hidden_layers)
        super().__init__(model, layers, model.get_output_embeddings(), all_logits)
        self._layers = num_hidden_layers

    def logits(self, input_ids: Tensor, positions: Tensor, cache: OnePass) -> Tensor:
        """See TracedMaster."""
        caches = OpCache(self._layers, cache)
        with caches.running():
            output = self.decoder(
                input_ids=input_ids, attention_mask=None, position_ids=positions, past_key_values=caches, use_cache=True
            )
        return cast(Tensor, output.logits)


def open_transformers(path: Path, trust_remote_code: bool = False) -> TransformersModel:
    """Open a directory that transformers loads.

    Raises:
        CheckpointError: it is incomplete, damaged, or not safetensors.
        ConfigError: transformers does not know the model, or headfold cannot export it.
    """
    if not path.is_dir():
        raise CheckpointError(
            "is no directory", where=path, fix="The road of transformers takes Hugging Face directories."
        )
    if not list(path.glob("*.safetensors")):
        raise CheckpointError(
            "has no safetensors, and pickles are never loaded: they can run any code",
            where=path,
            fix="Download it again.",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a configuration's own validation raises
        raise unreadable(error, path) from error
    refuse_other_kinds(config, path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ConfigError(
            f"its weights are quantized ({method}), which headfold does not read",
            where=path,
            fix="Take the unquantized one.",
        )

    def load(dtype: torch.dtype, attention: str) -> PreTrainedModel:
        try:
            with quiet():
                model, found = AutoModelForCausalLM.from_pretrained(
                    path,
                    config=copy.deepcopy(config),
                    dtype=dtype,
                    attn_implementation=attention,
                    experts_implementation="eager",
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                    output_loading_info=True,
                )
        except Exception as error:  # of its loader, of safetensors, of a model's own code
            raise CheckpointError(
                f"transformers cannot load it: {one_line(error)}", where=path, fix="Download it again."
            ) from error
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if found[what]:
                names = sorted(key if isinstance(key, str) else key[0] for key in found[what])
                raise CheckpointError(
                    f"{what.replace('_keys', '')} tensors: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                    where=path,
                    fix=other_class(config),
                )
        return cast(PreTrainedModel, model.eval().requires_grad_(False))

    tensors, elements = stored_sizes(path)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:  # before they are made
        raise ConfigError(f"it has {layers} layers, and {tensors} tensors", where=path, fix=BELONGS)
    opened = TransformersModel(config, load, path, TokenizerFiles(side_files(path)))
    parameters = sum(map(math.prod, opened.shapes.values()))
    if parameters > _SHARED * elements:  # before transformers takes memory for them
        raise CheckpointError(f"it has {parameters:,} parameters, and its files {elements:,}", where=path, fix=BELONGS)
    return opened


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, path: Path) -> PreTrainedModel:
    """The model without weights, its attention and experts the ops'."""
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME, experts_implementation=experts.NAME
            )
    except Exception as error:  # of a class that has no AttentionInterface, of a model's own code
        raise unmade(config, error, NAME, path) from error
    with _found_in(path):
        experts.learn_gates(model)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _facts(model: PreTrainedModel, path: Path) -> Facts:
    """Learned from a pass on meta tensors, so they are what the model does, not what its configuration seems to say."""
    config = model.config
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    if getattr(type(model), "_is_stateful", False):
        raise ConfigError(f"{config.model_type} has a state beside keys and values", where=path, fix=ROAD)
    master = TransformersMaster(model, count, all_logits=True)
    with torch.device("meta"):
        ids = torch.zeros(1, 3, dtype=torch.long)
        try:
            with _found_in(path):
                _, cache, hidden = master.run(ids, torch.ones_like(ids), None)
        except ConfigError:
            raise
        except Exception as error:  # whatever a model's own code raises when it finds no cache of its own kind
            raise unrun(model, error, path) from error
    silent = [layer for layer in range(count) if layer not in cache.facts]
    if silent or len(hidden) != count:
        raise unattending(model, silent[0] if silent else len(hidden), path)
    capacity = getattr(text, "max_position_embeddings", None)
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
        pad_token_id=text.pad_token_id,
    )


@contextmanager
def _found_in(path: Path) -> Iterator[None]:
    """What is refused inside the block says of which checkpoint it is."""
    try:
        yield
    except ConfigError as error:
        where = f"{path}: {error.where}" if error.where else path
        raise ConfigError(error.what, where=where, fix=error.fix) from error
