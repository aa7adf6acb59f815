"""An outline of a transformers decoder: see `headfold.export.exportables.outline`."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from headfold.export.exportables.base import Exportable, Master, Tensors
from headfold.export.exportables.facts import Facts, LayerFacts
from headfold.export.exportables.foreign.traced import ModelTensors
from headfold.export.exportables.transformers_road.loading import quiet, with_linear
from headfold.export.exportables.transformers_road.transformers_model import (
    TransformersMaster,
    TransformersModel,
    on_meta,
)
from headfold.export.exportables.transformers_road.transformers_oracle import decoder_layers
from headfold.plugins.dtypes import Quantized


def transformers_outline(exportable: Exportable) -> Exportable:
    """Of one of `TransformersModel`."""
    assert isinstance(exportable, TransformersModel)
    return _Outline(exportable)


class _Outline(TransformersModel):
    """See Exportable. It is traced, and not run."""

    def __init__(self, whole: TransformersModel) -> None:
        self.config, self.path, self.tokenizer, self.directory = (
            whole.config,
            whole.path,
            whole.tokenizer,
            whole.directory,
        )
        self._load, self._all = whole.load, len(whole.facts.layers)
        self.facts: Facts = replace(whole.facts, layers=whole.facts.layers[: self._count(whole.facts)])

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """See Exportable; the quantized cache is refused as the whole model's is."""
        if cache is not None:
            return super().master(dtype, capacity, all_logits, cache)
        layers = self.facts.layers
        model = self._shortened(on_meta(self.config, dtype, self.path))
        return TransformersMaster(model, len(layers), all_logits, layers)

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """See Exportable: buffers have their values, and parameters are zeros; names and shapes are checked as of the whole model."""
        self.load(dtype, values=False)
        with quiet(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        model.tie_weights()
        return _Zeros(self._shortened(with_linear(model)), self.path)

    def _shortened(self, model: PreTrainedModel) -> PreTrainedModel:
        del decoder_layers(model, self._all)[len(self.facts.layers) :]
        return model

    def _count(self, facts: Facts) -> int:
        """How many layers have one of every kind."""
        model = on_meta(self.config, torch.float32, self.path)
        layers = decoder_layers(model, self._all)
        kinds = [_kind(layer, told) for layer, told in zip(layers, facts.layers, strict=True)]
        return max(kinds.index(kind) for kind in kinds) + 1


class _Zeros(ModelTensors):
    """The parameters and buffers of a model whose parameters are on the meta device."""

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        tensor = self._tensors[name]
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


def _kind(layer: nn.Module, told: LayerFacts) -> tuple[Any, ...]:
    """What makes a layer's graph: how it attends, its modules, what they hold, and what is written in them but their own number."""
    parts = [
        (
            name,
            type(module),
            *((key, x) for key, x in sorted(vars(module).items()) if _is_plain(key, x)),
            *(
                (key, tuple(x.shape))
                for key, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            ),
        )
        for name, module in layer.named_modules()
    ]
    return told, *parts


def _is_plain(name: str, value: Any) -> bool:
    return name not in {"layer_idx", "layer_id", "layer_number"} and isinstance(value, bool | int | float | str)
