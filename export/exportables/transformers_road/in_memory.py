"""A transformers model that is in memory, fine-tuned or with an adapter merged into it, as an Exportable: nothing is written first."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.foreign.copying import in_dtype, without_weights
from headfold.export.exportables.transformers_road.transformers_model import TransformersModel
from headfold.export.model.numbers import check_numbers
from headfold.runtime.errors import ConfigError


def transformers_in_memory(
    model: PreTrainedModel, name: str = "memory", tokenizer: TokenizerFiles | None = None
) -> TransformersModel:
    """Give the result to `headfold.export.bundle.pipeline.export_bundle`. The model itself stays as it is.

    Args:
        model: any causal language model of transformers.
        name: what messages and the bundle's manifest call it.
        tokenizer: files to put into the bundle.

    Raises:
        ConfigError: it is no causal language model, has numbers that no model has, or its attention cannot become headfold's op;
            which module, and why, is named.
    """

    def load(dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
        copied = in_dtype(model, dtype) if values else without_weights(model, dtype)
        copied.set_attn_implementation("eager")
        return copied

    check_numbers(model.config.to_dict(), name)
    exportable = TransformersModel(copy.deepcopy(model.config), load, Path(name), tokenizer or TokenizerFiles())
    loaded, wanted = exportable.load(torch.float32, values=False), exportable.shapes
    found = {name: tuple(x.shape) for name, x in loaded.named_parameters()}
    different = [parameter for parameter in {**wanted, **found} if wanted.get(parameter) != found.get(parameter)]
    if different:
        raise ConfigError(
            f"{type(model).__name__} is no plain causal language model of its configuration: {different[0]}",
            where=name,
            fix="Merge adapters first (merge_and_unload), and give the model that AutoModelForCausalLM makes.",
        )
    return exportable
