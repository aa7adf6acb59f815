"""A transformers model that is in memory, fine-tuned or with an adapter merged into it, as an Exportable: nothing is written first."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.transformers_road.transformers_model import TransformersModel


def transformers_in_memory(
    model: PreTrainedModel, name: str = "memory", tokenizer: Mapping[str, bytes] | None = None
) -> TransformersModel:
    """Give the result to `headfold.export.bundle.pipeline.export_bundle`. The model itself stays as it is: it is copied.

    Args:
        model: any causal language model of transformers, on the CPU.
        name: what messages and the bundle's manifest call it.
        tokenizer: files by name, as `tokenizer.json`, to put into the bundle.

    Raises:
        ConfigError: its attention cannot become headfold's op; which module, and why, is named.
    """

    def load(dtype: torch.dtype, attention: str) -> PreTrainedModel:
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        copied.set_attn_implementation(attention)
        for parameter in copied.parameters():  # not the buffers: frequencies are float32 in every model
            parameter.data = parameter.data.to(dtype)
        return copied

    return TransformersModel(copy.deepcopy(model.config), load, Path(name), TokenizerFiles(dict(tokenizer or {})))
