"""What a checkpoint is to the rest of headfold: a configuration, tensors read one at a time, and tokenizer files.

`opening.py` picks the reader by what lies at a path: `hf.py` for Hugging Face directories, `gguf/` for GGUF files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.model.config import ModelConfig
from headfold.runtime.errors import CheckpointError


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer and generation files by name, as they go into a bundle or a Hugging Face directory; may be empty."""

    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def definition(self) -> bytes | None:
        """The content of tokenizer.json."""
        return self.files.get("tokenizer.json")


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

    @property
    def ignored(self) -> Sequence[str]:
        """Tensors that lie beside the weights, as training and serving leave them, and that no forward pass reads."""
        ...

    @property
    def titles(self) -> Mapping[str, str]:
        """What a person is told of how its weights lie there: their quantization, its adapter; where it has them."""
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

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The parts that a tensor is stored in, from which `read` makes floats; None where it is stored in another way."""
        ...

    def kind(self, name: str) -> str | None:
        """What a tensor is quantized in, as a person calls it ("Q4_K"); None for floats."""
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
    ignored: Sequence[str] = ()
    titles: Mapping[str, str] = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """See Checkpoint."""
        return self.tensors[name]

    def quantized(self, name: str) -> None:
        """See Checkpoint."""
        return None

    def kind(self, name: str) -> None:
        """See Checkpoint."""
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


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
            fix="The checkpoint is incomplete, or its configuration is another model's.",
        )
    if extra:
        raise CheckpointError(
            _count("that this model does not have", extra),
            where=path,
            fix="Its configuration is another model's, or a feature is not implemented.",
        )
    if wrong:
        shapes = [f"{n} {list(actual[n])} instead of {list(expected[n])}" for n in wrong]
        raise CheckpointError(
            _count("of the wrong shape", shapes), where=path, fix="Its configuration does not belong to these weights."
        )


def _count(what: str, names: list[str]) -> str:
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} tensor{plural} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
