"""Hugging Face directories, in: config.json, one or sharded safetensors, tokenizer files. Pickles are never loaded.

Strict: what is read has exactly the decoder's tensors, or what is left aside is named. `hf_writer.py` writes them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from headfold.export.checkpoints.base import TokenizerFiles, check_tensors
from headfold.export.checkpoints.directories.directory import Directory, check_copy
from headfold.export.checkpoints.directories.lora import without_adapter
from headfold.export.checkpoints.directories.stored import EMBEDDING, HEAD
from headfold.export.checkpoints.families import config_from_json
from headfold.export.checkpoints.hf_tensors import scan
from headfold.export.checkpoints.quantized.parts import Dequantized
from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.checkpoints.side_files import CONFIG
from headfold.export.checkpoints.tokenizer_of_parts import with_tokenizer


class HuggingFaceCheckpoint:
    """A directory with config.json and safetensors, or an adapter over one; see `headfold.export.checkpoints.base.Checkpoint`.

    Args:
        path: of the directory.
        base: of an adapter, where it is not what the adapter names.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly those of the model.
        ConfigError: the model is not one headfold implements.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self.directory = directory = Directory(path, base)
        self.config = config_from_json(directory.config, directory.place / CONFIG)
        self.tokenizer = TokenizerFiles(with_tokenizer(directory.tokenizer, directory.config, path))
        self._shapes = expected_shapes(self.config)
        tied = self.config.tie_word_embeddings
        self._stored, self.ignored = scan(directory, self._shapes, tied)
        self.titles = directory.titles
        if tied:
            directory.check_tied()
        if tied and HEAD in self._stored and EMBEDDING in self._stored:
            check_copy(self._stored.pop(HEAD), self._stored[EMBEDDING], path)
        check_tensors(path, self._shapes, {name: stored.shape for name, stored in self._stored.items()})

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self._stored[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """See Checkpoint."""
        return self._stored[name].read()

    def quantized(self, name: str) -> QuantizedTensor | None:
        """See Checkpoint."""
        return self._stored[name].quantized()

    def kind(self, name: str) -> str | None:
        """See Checkpoint."""
        source = self._stored[name]
        format_ = self.directory.format if isinstance(without_adapter(source), Dequantized) else None
        return format_.title if format_ is not None else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)
