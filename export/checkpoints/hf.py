"""Hugging Face directories, in: config.json, one or sharded safetensors, tokenizer files. Pickles are never loaded.

Strict: what is read has exactly the decoder's tensors, or what is left aside is named. `hf_writer.py` writes them.
"""

from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path

import torch

from headfold.export.checkpoints.base import TokenizerFiles, check_tensors
from headfold.export.checkpoints.families import config_from_json
from headfold.export.checkpoints.hf_tensors import EMBEDDING, HEAD, scan, shards_of
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.checkpoints.side_files import CONFIG, INDEX, SINGLE, TOKENIZER_FILES, read_json, side_files
from headfold.export.checkpoints.tokenizer_of_parts import with_tokenizer
from headfold.runtime.errors import CheckpointError


class HuggingFaceCheckpoint:
    """A directory with config.json and safetensors; see `headfold.export.checkpoints.base.Checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly those of the model.
        ConfigError: the model is not one headfold implements.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_from_json(read_json(path / CONFIG), path / CONFIG)
        self.tokenizer = TokenizerFiles(with_tokenizer(side_files(path), path))
        self._shapes = expected_shapes(self.config)
        tied = self.config.tie_word_embeddings
        self._stored, self.ignored = scan(path, self._shapes, tied)
        if tied and HEAD in self._stored and EMBEDDING in self._stored:
            head = self._stored.pop(HEAD)  # a copy, if it is one
            if not torch.equal(head.read(), self._stored[EMBEDDING].read()):
                raise CheckpointError(
                    "lm_head.weight differs from the embedding, though tie_word_embeddings is true",
                    where=path,
                    fix="Set tie_word_embeddings to false in config.json if the head is meant to be used.",
                )
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)


def download(name: str) -> Path:
    """Fetch `organisation/name` from the Hugging Face hub into its cache: configuration, tokenizer, and the weights it names.

    A single file of weights is taken where there is one, otherwise those that the index names: nothing else that lies there.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=[CONFIG, SINGLE, INDEX, *TOKENIZER_FILES]))
        if (path / INDEX).is_file() and not (path / SINGLE).is_file():
            shards = sorted(set(shards_of(path / INDEX).values()))
            snapshot_download(name, revision=path.name, allow_patterns=[escape(shard) for shard in shards])
    except CheckpointError:
        raise
    except Exception as error:  # whatever its HTTP client raises: it has changed clients twice
        raise CheckpointError(
            f"is no file here and cannot be fetched from the hub: {error}",
            where=name,
            fix="Download it, and name its directory.",
        ) from error
    return path
