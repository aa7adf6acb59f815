"""What a checkpoint is to the rest of headfold: a configuration, tensors read one at a time, and tokenizer files.

`open_checkpoint` picks the reader by what lies at the path; `hf.py` reads Hugging Face directories, `gguf_file.py` GGUF files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from headfold.export.config import ModelConfig


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer and generation files as they go into a bundle or a Hugging Face directory, by file name; may be empty."""

    files: Mapping[str, bytes] = field(
        default_factory=dict
    )  # tokenizer.json, tokenizer_config.json, chat_template.jinja, ...


class Checkpoint(Protocol):
    """Tensors carry the names of `headfold.export.model.Decoder`'s state dict, whatever the file calls them."""

    path: Path
    config: ModelConfig
    tokenizer: TokenizerFiles

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
