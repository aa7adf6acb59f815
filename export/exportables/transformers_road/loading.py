"""Weights into transformers' models: by its own loader from the files, or, where tensors are not as they are stored, through ours.

Either way transformers renames, joins and casts them as its class of the model says.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from headfold.export.checkpoints.directories.directory import Directory
from headfold.export.checkpoints.directories.stored import Source
from headfold.runtime.errors import CheckpointError, HeadfoldError


def load_model(
    directory: Directory,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    values: bool = True,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Transformers' model with eager attention and the directory's weights, and its word on names and shapes that do not fit.

    Args:
        directory: whose weights.
        config: of the model, as it is unquantized.
        dtype: that the weights are cast to.
        trust_remote_code: let transformers run code that lies beside the weights.
        values: read the weights; without, parameters are on the meta device, and only names and shapes are looked at.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    options: dict[str, Any] = {
        "config": copy.deepcopy(config),
        "dtype": dtype,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "ignore_mismatched_sizes": True,  # the caller refuses them by name
        "output_loading_info": True,
    }
    try:
        with quiet():
            if directory.as_stored and values:
                model, found = AutoModelForCausalLM.from_pretrained(
                    directory.place,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    **options,
                )
            else:
                with torch.device("meta"):
                    kind = type(
                        AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
                    )
                tensors = {name: _Unread(source, values) for name, source in directory.tensors.items()}
                model, found = kind.from_pretrained(
                    None, state_dict=tensors, device_map=None if values else "meta", **options
                )
    except HeadfoldError:
        raise
    except Exception as error:  # of its loader, of safetensors, of a model's own code
        raise CheckpointError(
            f"transformers cannot load it: {one_line(error)}", where=directory.path, fix="Download it again."
        ) from error
    return model.eval().requires_grad_(False), found


class InputsLast(nn.Linear):
    """A Linear in place of a Conv1D, GPT-2's product with a weight [in, out]: the same numbers, seen as [out, in]."""

    def __init__(self, conv: Conv1D) -> None:
        super().__init__(conv.nx, conv.nf, device="meta")
        self.weight, self.bias = nn.Parameter(conv.weight.detach().mT, requires_grad=False), conv.bias


def with_linear(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself without Conv1D: all that rounds, proves and compiles products then knows one kind of weight."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                setattr(parent, name, InputsLast(child))
    return model


def stored_dtype(directory: Directory) -> torch.dtype | None:
    """The dtype of the weights, where they lie in files and all have one: as they are, they need no memory of their own."""
    if not directory.as_stored:
        return None
    dtypes = {source.dtype for source in directory.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


class _Unread:
    """What transformers takes for a slice of a safetensors file: it is read when it is wanted, if at all, and forgotten."""

    def __init__(self, source: Source, values: bool) -> None:
        self._source, self._values = source, values

    def __getitem__(self, everything: object) -> Tensor:
        if self._values:
            return self._source.read()
        return torch.empty(self._source.shape, dtype=self._source.dtype, device="meta")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws progress bars and warns of what is checked here anyway."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """Its type and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
