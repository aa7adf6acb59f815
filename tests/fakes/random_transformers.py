"""Tiny random models of transformers as directories, large enough weights that every layer matters."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from headfold.export.exportables.tried import configuration

logging.set_verbosity_error()
logging.disable_progress_bar()


def random_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """The same one every time, in float32, with its own eager attention."""
    config = AutoConfig.for_model(model_type, **configuration(model_type) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def save_random(model_type: str, directory: Path, **changes: Any) -> Path:
    """Write it as a directory."""
    random_model(model_type, **changes).save_pretrained(directory)
    return directory
