"""Shared fixtures: small random models as checkpoints in memory, and where the real model is."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from headfold.export.bundle import write_manifest
from headfold.export.checkpoint import TokenizerFiles
from headfold.export.config import ModelConfig
from headfold.export.graph import export_graph
from headfold.export.model import Decoder
from headfold.export.pipeline import _spec
from headfold.export.weights import attach_weights, save_model
from headfold.runtime.manifest import MODEL, CacheSpec, Manifest, read_manifest

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


@dataclass
class TensorRTToy:
    """A bundle of random weights in 16 bits, and the decoder whose weights it has, rounded alike."""

    bundle: Path
    decoder: Decoder
    manifest: Manifest


TENSORRT_CAPACITY = 40
TENSORRT_TOYS = {  # between them: grouped heads, a window in one layer, q/k norms, biases, both norms, two activations
    "float16": {"sliding_window": 5, "sliding_layers": (1,), "qk_norm": True},
    "bfloat16": {
        "norm": "layer_norm",
        "qkv_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="session")
def tensorrt_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TensorRTToy]:
    """Exports a small bundle of a dtype, once; whoever changes it copies it first."""
    made: dict[str, TensorRTToy] = {}

    def make(dtype: str) -> TensorRTToy:
        if dtype in made:
            return made[dtype]
        config = replace(CONFIG, num_hidden_layers=2, **TENSORRT_TOYS[dtype])
        torch.manual_seed(0)
        decoder = Decoder(config, TENSORRT_CAPACITY).eval().requires_grad_(False)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        path, torch_dtype = tmp_path_factory.mktemp("tensorrt"), getattr(torch, dtype)
        model = export_graph(config, torch_dtype, TENSORRT_CAPACITY, all_logits=True)
        attach_weights(model, MemoryCheckpoint(decoder), torch_dtype, TENSORRT_CAPACITY, allow_nan=False)
        save_model(model, path / MODEL, lambda name, size: None)
        write_manifest(
            path,
            format_version=1,
            headfold_version="0",
            source="memory",
            config=config.to_json(),
            vocab_size=config.vocab_size,
            parameters=1,
            dtype=dtype,
            logits="all",
            inputs=[_spec(value) for value in model.graph.inputs],
            outputs=[_spec(value) for value in model.graph.outputs],
            cache=CacheSpec(
                num_hidden_layers=2,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                capacity=TENSORRT_CAPACITY,
            ),
            tools={},
            parity=None,
        )
        made[dtype] = TensorRTToy(path, decoder.to(torch_dtype).float(), read_manifest(path))
        return made[dtype]

    return make
