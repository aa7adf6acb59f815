"""What a checkpoint is to the rest of headfold: a configuration, tensors read one at a time, and tokenizer files.

`open_checkpoint` picks the reader by what lies at the path; `hf.py` reads Hugging Face directories, `gguf_file.py` GGUF files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.runtime.errors import CheckpointError


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer and generation files by name, as they go into a bundle or a Hugging Face directory; may be empty."""

    files: Mapping[str, bytes] = field(default_factory=dict)


class Checkpoint(Protocol):
    """Tensors carry the names of `headfold.export.model.decoder.Decoder`'s state dict, whatever the file calls them."""

    @property
    def path(self) -> Path:
        """Where it lies, for messages."""
        ...

    @property
    def config(self) -> ModelConfig:
        """What the tensors are for."""
        ...

    @property
    def tokenizer(self) -> TokenizerFiles:
        """The files to pass on."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor, exactly those of the decoder's state dict; nothing is read."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor has in the file (float32 where the file is quantized)."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, on the CPU. Reads only this tensor."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The tensors' names, in the decoder's order."""
        ...


@dataclass(frozen=True)
class MemoryCheckpoint:
    """A checkpoint whose tensors are in memory: what a conversion or a training run hands on. See Checkpoint."""

    path: Path  # where it came from, for messages
    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]  # a decoder's state dict
    tokenizer: TokenizerFiles = field(default_factory=TokenizerFiles)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """See Checkpoint."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, or `organisation/name` on the Hugging Face hub.

    Raises:
        CheckpointError: there is none, it is damaged, or its tensors are not exactly what its configuration implies.
        ConfigError: its configuration is not one headfold implements.
    """
    from headfold.export.checkpoints.gguf_file import GGUFCheckpoint
    from headfold.export.checkpoints.hf import HuggingFaceCheckpoint, download

    if path.is_file():
        return GGUFCheckpoint(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in {".", ".."}:
        return HuggingFaceCheckpoint(download(path.as_posix()))
    raise CheckpointError("no such file or directory", where=path, fix="Name a GGUF file or a Hugging Face directory.")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this model must have: those of the decoder itself."""
    with torch.device("meta"):
        decoder = Decoder(config, capacity=1)
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what is there with what must be there.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape; the first three are named.
    """
    missing, extra = [n for n in expected if n not in actual], [n for n in actual if n not in expected]
    wrong = [n for n in expected if n in actual and tuple(actual[n]) != expected[n]]
    if missing:
        raise CheckpointError(
            _count("missing", missing),
            where=path,
            fix="The checkpoint is incomplete, or config.json is another model's.",
        )
    if extra:
        raise CheckpointError(
            _count("that this model does not have", extra),
            where=path,
            fix="config.json is another model's, or a feature is not implemented.",
        )
    if wrong:
        shapes = [f"{n} {list(actual[n])} instead of {list(expected[n])}" for n in wrong]
        raise CheckpointError(
            _count("of the wrong shape", shapes), where=path, fix="config.json does not belong to these weights."
        )


def _count(what: str, names: list[str]) -> str:
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} tensor{plural} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, capacity: int | None = None) -> Decoder:
    """The decoder with the checkpoint's weights in `dtype`, ready for inference; one copy of the weights is in memory."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, capacity)
    for name in checkpoint:
        decoder.load_state_dict({name: checkpoint.read(name).to(dtype)}, strict=False, assign=True)
    decoder.cos_cache, decoder.sin_cache = decoder.cos_cache.to(dtype), decoder.sin_cache.to(dtype)
    return decoder.eval().requires_grad_(False)
