"""Hugging Face directories, out: what is written loads in transformers unchanged, and is complete or not there."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.families import config_to_json
from headfold.export.checkpoints.side_files import CONFIG, INDEX, SINGLE
from headfold.export.publishing import one_line, publish
from headfold.runtime.errors import CheckpointError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in safetensors' message, which is all that it tells


def save_hf(directory: Path, checkpoint: Checkpoint, dtype: torch.dtype, max_shard_bytes: int = 4 << 30) -> None:
    """Write a checkpoint as a directory that transformers loads unchanged, complete or not at all; see `write_hf`.

    Raises:
        CheckpointError: `directory` exists, or cannot be written.
    """
    with one_line(CheckpointError, directory, "Free some space, or choose another place."), publish(directory) as stage:
        write_hf(stage, checkpoint, dtype, max_shard_bytes)


def write_hf(stage: Path, checkpoint: Checkpoint, dtype: torch.dtype, max_shard_bytes: int = 4 << 30) -> None:
    """Write a checkpoint's files into a directory that exists.

    One shard at a time is in memory: at most `max_shard_bytes`, or one tensor.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in checkpoint.shapes().items():
        count = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + count > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: checkpoint.read(name).to(dtype).contiguous() for name in names}
        save_tensors(tensors, stage / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(torch.Size(shape).numel() for shape in checkpoint.shapes().values()) * dtype.itemsize
    if len(shards) > 1:
        _write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = config_to_json(checkpoint.config) | {"dtype": str(dtype).removeprefix("torch.")}
    _write_json(stage / CONFIG, content)
    for name, data in checkpoint.tokenizer.files.items():
        (stage / name).write_bytes(data)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, for whom the user's umask lets read its directory; safetensors itself writes for the owner alone.

    Raises:
        OSError: the disk is full or may not be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        failed = _OS_ERROR.search(str(error))
        if failed is None:
            raise
        raise OSError(int(failed[1]), os.strerror(int(failed[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
