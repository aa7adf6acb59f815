"""Shared fixtures: small random models as checkpoints in memory, and where the real model is."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from headfold.export.checkpoint import TokenizerFiles
from headfold.export.config import ModelConfig
from headfold.export.model import Decoder

torch.set_num_threads(2)


class MemoryCheckpoint:
    """A checkpoint whose tensors are a decoder's."""

    def __init__(self, decoder: Decoder) -> None:
        self.path, self.config, self.tokenizer = Path("memory"), decoder.config, TokenizerFiles()
        self.decoder, self.tensors = decoder, decoder.state_dict()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    eos_token_id=(0,),
)


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def memory_checkpoint() -> Callable[[ModelConfig], MemoryCheckpoint]:
    """Makes a checkpoint of random weights, the same ones every time, large enough that every layer matters."""

    def make(config: ModelConfig) -> MemoryCheckpoint:
        torch.manual_seed(0)
        decoder = Decoder(config).eval().requires_grad_(False)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return MemoryCheckpoint(decoder)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; scripts/test fetches it."""
    default = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("HEADFOLD_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"{path} is missing: scripts/test fetches it, or set HEADFOLD_SMOLLM2")
    return path
