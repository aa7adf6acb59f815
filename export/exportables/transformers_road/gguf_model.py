"""GGUF files of an architecture that headfold has no table of: transformers says what their metadata means and which tensor is which.

The tensors are dequantized one at a time; transformers' own loader has all of them in memory, and takes four times as long.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from headfold.export.checkpoints.gguf.reading import GGUFFile, makes_sense
from headfold.export.checkpoints.gguf.tokenizer import tokenizer_files
from headfold.export.exportables.base import Tensors
from headfold.export.exportables.transformers_road.loading import InputsLast, one_line, quiet, with_linear
from headfold.export.exportables.transformers_road.transformers_model import TransformersModel
from headfold.export.model.numbers import check_numbers
from headfold.runtime.errors import CheckpointError, ConfigError

_FIX = "Export from the Hugging Face directory of the model."
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of each family's 27B: that is how llama.cpp knows it
_SHAPES = frozenset(  # metadata that the tensors' own shapes say again
    {
        "attention.key_length",
        "attention.value_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "rope.dimension_count",
        "use_parallel_residual",  # of stablelm: whether its layers have a second norm
        "vocab_size",
    }
)


class GGUFModel(TransformersModel):
    """An Exportable of a GGUF file; see there."""

    def __init__(self, file: GGUFFile, config: PreTrainedConfig) -> None:
        self._weights = _Weights(file, config)
        text = config.get_text_config()
        with makes_sense(file.path):
            tokenizer = tokenizer_files(file.path, file.metadata, text.max_position_embeddings)
        super().__init__(config, self._weights.load, file.path, tokenizer)
        self._titles = file.titles

    @property
    def titles(self) -> Mapping[str, str]:
        """See Exportable."""
        return self._titles

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """See Exportable; read one at a time."""
        return self._weights


def open_gguf(path: Path) -> GGUFModel:
    """Open a GGUF file that transformers knows.

    Raises:
        CheckpointError: it is damaged, or its tensors are not those of the model.
        ConfigError: transformers does not know its architecture or something it asks for, or headfold cannot export the model.
    """
    file = GGUFFile(path)
    if file.split:
        raise ConfigError("transformers reads no split GGUF files", where=path, fix="Join it: gguf-split --merge.")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # whatever its reader and a configuration's own validation raise
        raise ConfigError(f"transformers cannot read its metadata: {one_line(error)}", where=path, fix=_FIX) from error
    check_numbers(config.to_dict(), path)
    _set_attention_scale(config)
    _refuse_unread(file, config)
    return GGUFModel(file, config)


def _set_attention_scale(config: PreTrainedConfig) -> None:
    """What Gemma's queries are divided by is in no metadata, and transformers takes 256 for all: here it is what llama.cpp takes."""
    largest = _LARGEST.get(config.model_type)
    if largest is not None:
        share = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = share if config.num_hidden_layers == largest else config.head_dim


def _refuse_unread(file: GGUFFile, config: PreTrainedConfig) -> None:
    """What the file says of the model and transformers passes over would be lost in silence, as a scaled RoPE.

    It may be what the configuration has anyway, as gemma2's soft caps.
    """
    architecture = file.metadata["general.architecture"]
    tables = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    read = tables.get(architecture) or tables.get(config.model_type) or tables.get(architecture.replace("moe", "_moe"))
    for name, value in file.metadata.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in _SHAPES or key in (read or {}):
            continue
        if getattr(config.get_text_config(), key.rpartition(".")[2], None) != value:
            raise ConfigError(f"transformers does not read its metadata {name}", where=file.path, fix=_FIX)


class _Weights:
    """The parameters of transformers' model, each made of its tensors in the file; and its buffers. See Tensors."""

    def __init__(self, file: GGUFFile, config: PreTrainedConfig) -> None:
        self.path, self._file, self._config = file.path, file, config
        model = self._empty(torch.float32)
        self._buffers: dict[str, Tensor] = dict(model.named_buffers())
        self._shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}  # what is tied has its first name
        self._turned = {f"{name}.weight" for name, x in model.named_modules() if isinstance(x, InputsLast)}
        processor = TENSOR_PROCESSORS.get(file.metadata["general.architecture"], TensorProcessor)
        self._processor = processor(config=config.get_text_config().to_dict())
        try:
            self._names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:  # it reads the metadata of some whose tensors it has no names of
            what = f"transformers cannot read its tensors: {one_line(error)}"
            raise ConfigError(what, where=file.path, fix=_FIX) from error
        self._sources: dict[str, list[str]] = {}
        for name in file.tensors:
            parameter = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if parameter not in self._shapes:
                raise CheckpointError(f"tensor {name} is none of {config.model_type}'s", where=file.path, fix=_FIX)
            self._sources.setdefault(parameter, []).append(name)
        missing = [name for name in self._shapes if name not in self._sources]
        if missing:
            raise CheckpointError(f"has no {', '.join(missing[:3])}", where=file.path, fix=_FIX)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the parameters: the graph must use every one of them."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """See Tensors; buffers too.

        Raises:
            CheckpointError: it cannot be dequantized, or has another shape than the model's.
        """
        if name in self._buffers:
            return self._buffers[name]
        made: dict[str, dict[str, Tensor]] = {"tensors": {}}  # where transformers puts what it makes of several
        for source in self._sources[name]:
            values = self._file.dequantized(self._file.tensors[source])
            result = self._processor.process(
                weights=values, name=source, tensor_key_mapping=self._names, parsed_parameters=made
            )
            if result.name is not None:
                made["tensors"][name] = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
        tensor = made["tensors"].get(name)
        tensor = tensor.mT if tensor is not None and name in self._turned else tensor
        if tensor is None or tuple(tensor.shape) != self._shapes[name]:
            found = None if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"tensor {name} is {found}, not {list(self._shapes[name])}", where=self.path, fix="Download it again."
            )
        return tensor

    def load(self, dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
        """The whole model with eager attention, its weights in `dtype`; see Load."""
        model = self._empty(dtype)
        for name in self._shapes if values else ():
            model.load_state_dict({name: self.read(name).to(dtype)}, strict=False, assign=True)
        model.tie_weights()
        return cast(PreTrainedModel, model.eval().requires_grad_(False))

    def _empty(self, dtype: torch.dtype) -> PreTrainedModel:
        """Parameters on meta tensors, buffers real."""
        try:
            with quiet(), init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    self._config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
                )
        except Exception as error:  # of a model that is no decoder, of sizes that make no sense
            raise ConfigError(
                f"no {self._config.model_type} can be made of its metadata: {one_line(error)}",
                where=self.path,
                fix=_FIX,
            ) from error
        model.tie_weights()
        return with_linear(cast(PreTrainedModel, model))
