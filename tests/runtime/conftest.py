"""A toy bundle made by the real exporter: two layers, and a byte-level tokenizer whose 256 bytes are all tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from headfold.export.bundle import write_json, write_manifest
from headfold.export.config import ModelConfig
from headfold.export.graph import export_graph
from headfold.export.model import Decoder
from headfold.export.weights import attach_weights, save_model
from headfold.runtime.manifest import MODEL, CacheSpec, TensorSpec

CAPACITY = 64
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=CAPACITY,
    eos_token_id=(0,),
)
SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Toy:
    """A bundle and the decoder it was traced from."""

    path: Path
    decoder: Decoder
    config: ModelConfig

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The oracle's greedy answer, each token from scratch without a cache."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(int(self.decoder(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(ids) :]


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and the lazy dog sleeps on"] * 4, trainer
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def make_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Toy]:
    """Exports the toy; the same weights every time. Each kind is exported once."""
    made: dict[tuple[object, ...], Toy] = {}

    def make(all_logits: bool = False, dtype: str = "float32") -> Toy:
        if (all_logits, dtype) in made:
            return made[all_logits, dtype]
        torch.manual_seed(0)
        decoder = Decoder(CONFIG).eval().requires_grad_(False)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        tensors = decoder.state_dict()
        checkpoint: Any = SimpleNamespace(
            path=Path("memory"),
            config=CONFIG,
            shapes=lambda: {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            read=tensors.__getitem__,
        )
        path = tmp_path_factory.mktemp("bundle")
        model = export_graph(CONFIG, getattr(torch, dtype), CAPACITY, all_logits)
        attach_weights(model, checkpoint, getattr(torch, dtype), CAPACITY, allow_nan=False)
        save_model(model, path / MODEL, lambda name, size: None)
        train_tokenizer().save(str(path / "tokenizer.json"))
        settings = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(path / "tokenizer_config.json", settings)
        (path / "chat_template.jinja").write_text(CHATML)
        write_json(path / "generation_config.json", {"eos_token_id": 0})

        def spec(value: Any) -> TensorSpec:
            shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)

        write_manifest(
            path,
            format_version=1,
            headfold_version="0",
            source="memory",
            config=CONFIG.to_json(),
            vocab_size=CONFIG.vocab_size,
            parameters=1,
            dtype=dtype,
            logits="all" if all_logits else "last",
            inputs=[spec(value) for value in model.graph.inputs],
            outputs=[spec(value) for value in model.graph.outputs],
            cache=CacheSpec(num_hidden_layers=2, num_key_value_heads=2, head_dim=16, capacity=CAPACITY),
            tools={},
            parity=None,
        )
        made[all_logits, dtype] = Toy(path, decoder, CONFIG)
        return made[all_logits, dtype]

    return make


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy()


@pytest.fixture
def changed(toy: Toy, tmp_path: Path) -> Callable[..., Path]:
    """Copies the toy's bundle with other side files, and a manifest that is right for them; None removes a file."""

    def change(files: dict[str, dict[str, Any] | str | None], **fields: Any) -> Path:
        path = tmp_path / "changed"
        path.mkdir()
        for source in toy.path.iterdir():
            if source.name not in files:
                (path / source.name).write_bytes(source.read_bytes())
        for name, content in files.items():
            if content is not None:
                (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        manifest = json.loads((toy.path / "manifest.json").read_text()) | fields
        (path / "manifest.json").unlink(missing_ok=True)
        del manifest["files"]
        write_manifest(path, **manifest)
        return path

    return change


@pytest.fixture
def config() -> ModelConfig:
    return replace(CONFIG)
