"""Open whatever lies at a path as a checkpoint, and make decoders of checkpoints."""

from pathlib import Path

import torch

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.gguf.file import GGUFCheckpoint
from headfold.export.checkpoints.hf import HuggingFaceCheckpoint, download
from headfold.export.model.decoder import Decoder
from headfold.runtime.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, or `organisation/name` on the Hugging Face hub.

    Raises:
        CheckpointError: there is none, it is damaged, or its tensors are not exactly what its configuration implies.
        ConfigError: its configuration is not one headfold implements.
    """
    if path.is_file():
        return GGUFCheckpoint(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in {".", ".."}:
        return HuggingFaceCheckpoint(download(path.as_posix()))
    raise CheckpointError("no such file or directory", where=path, fix="Name a GGUF file or a Hugging Face directory.")


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, capacity: int | None = None) -> Decoder:
    """The decoder with the checkpoint's weights in `dtype`, ready for inference; one copy of the weights is in memory."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, capacity)
    for name in checkpoint:
        decoder.load_state_dict({name: checkpoint.read(name).to(dtype)}, strict=False, assign=True)
    decoder.cos_cache, decoder.sin_cache = decoder.cos_cache.to(dtype), decoder.sin_cache.to(dtype)
    return decoder.eval().requires_grad_(False)


def trainable(checkpoint: Checkpoint, capacity: int | None = None) -> Decoder:
    """A float32 copy of the checkpoint's weights that can be trained."""
    decoder = load_decoder(checkpoint, torch.float32, capacity)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()  # a checkpoint may be another decoder's own tensors
    return decoder.requires_grad_(True).train()
