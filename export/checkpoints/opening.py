"""Open whatever lies at a path as a checkpoint, and make decoders of checkpoints."""

from pathlib import Path

import torch

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.directories.hub import download, is_hub_name
from headfold.export.checkpoints.families import FAMILIES, NotInTable
from headfold.export.checkpoints.gguf.file import GGUFCheckpoint
from headfold.export.checkpoints.hf import HuggingFaceCheckpoint
from headfold.export.model.decoder import Decoder
from headfold.runtime.errors import CheckpointError, ConfigError


def open_checkpoint(path: Path, base: Path | None = None) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, or `organisation/name` on the Hugging Face hub; `base` is an adapter's.

    Raises:
        CheckpointError: there is none, it is damaged, or its tensors are not exactly what its configuration implies.
        ConfigError: its configuration is not one headfold implements.
    """
    path = find(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path, base)
    if base is not None:
        raise CheckpointError("is no adapter, and needs no base", where=path, fix="Leave --base out.")
    return GGUFCheckpoint(path)


def open_own(path: Path) -> Checkpoint:
    """The same for what changes the model itself, which is headfold's own decoder: conversion and training.

    Raises:
        CheckpointError: see `open_checkpoint`.
        ConfigError: see `open_checkpoint`; or the model is one that only `headfold export` takes, by way of transformers.
    """
    try:
        return open_checkpoint(path)
    except NotInTable as error:
        raise ConfigError(
            f"{error.what}; convert, uptrain and sweep change headfold's own decoder",
            where=error.where or path,
            fix=f"They take {', '.join(FAMILIES)}; others go through `headfold export` as they are.",
        ) from error


def find(path: Path) -> Path:
    """The file or directory itself; `organisation/name` is fetched from the Hugging Face hub.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file() or path.is_dir():
        return path
    if is_hub_name(path):
        return download(path.as_posix())
    raise CheckpointError("no such file or directory", where=path, fix="Name a GGUF file or a Hugging Face directory.")


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    capacity: int | None = None,
) -> Decoder:
    """The decoder with the checkpoint's weights in `dtype`, ready for inference; one copy of the weights is in memory.

    None: each as it is stored. Of a directory they stay in its files, then.
    """
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, capacity)
    for name in checkpoint:
        tensor = checkpoint.read(name)
        decoder.load_state_dict({name: tensor if dtype is None else tensor.to(dtype)}, strict=False, assign=True)
    if dtype is not None:
        decoder.cos_cache, decoder.sin_cache = decoder.cos_cache.to(dtype), decoder.sin_cache.to(dtype)
    return decoder.eval().requires_grad_(False)


def trainable(checkpoint: Checkpoint, capacity: int | None = None) -> Decoder:
    """A float32 copy of the checkpoint's weights that can be trained."""
    decoder = load_decoder(checkpoint, torch.float32, capacity)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()  # a checkpoint may be another decoder's own tensors
    return decoder.requires_grad_(True).train()
