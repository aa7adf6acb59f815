"""Toys to train: a text, a tokenizer, a small multi-head checkpoint as a Hugging Face directory, and a student pooled from it."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.config import ModelConfig
from headfold.export.model.initialize import new_decoder
from headfold.export.progress import Reporter

TRAINED = ModelConfig(
    model_type="llama",
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=64,
    eos_token_id=(256,),
)


def byte_tokenizer(shift: int = 0) -> bytes:
    """A token per byte, and one that ends documents; `shift` rotates the ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: (index + shift) % 256 for index, symbol in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer.to_str().encode()


def prose(words: int = 4000) -> str:
    """Sentences from a tiny grammar: learnable in a few steps."""
    generator = random.Random(0)
    subjects, verbs, objects = ("the cat", "a dog", "the old man"), ("sees", "likes", "follows"), ("a bird", "the sea")
    sentence = (" ".join(map(generator.choice, (subjects, verbs, objects))) + "." for _ in range(words // 5))
    return "\n".join(sentence)


def pool(checkpoint, kv_heads: int) -> MemoryCheckpoint:
    """Mean pooling (Ainslie et al. 2023, section 2.1), the test's own."""
    config, tensors = checkpoint.config, {}
    for name in checkpoint:
        tensor = checkpoint.read(name)
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensor = tensor.view(kv_heads, -1, config.head_dim, tensor.shape[1]).mean(1).flatten(0, 1)
        tensors[name] = tensor
    return MemoryCheckpoint(
        checkpoint.path, replace(config, num_key_value_heads=kv_heads), tensors, checkpoint.tokenizer
    )


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    """A directory with `text.txt`, the checkpoint `mha`, and `student` with two key/value heads."""
    directory = tmp_path_factory.mktemp("toys")
    (directory / "text.txt").write_text(prose())
    files = TokenizerFiles({"tokenizer.json": byte_tokenizer()})
    decoder = new_decoder(TRAINED, seed=0)
    save_hf(directory / "mha", MemoryCheckpoint(directory, TRAINED, decoder.state_dict(), files), torch.float32)
    save_hf(directory / "student", pool(open_checkpoint(directory / "mha"), 2), torch.float32)
    return directory


@pytest.fixture(scope="session")
def toy_bundle(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `toy_checkpoint`. Unproven. Not to be changed: copy it."""
    path = tmp_path_factory.mktemp("toy") / "bundle"
    export_bundle(open_exportable(toy_checkpoint), path, ExportOptions(verify=False), Reporter(quiet=True))
    return path


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB; skips where that is not allowed."""
    mounted = []

    def mount(kib: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
        if os.name != "posix" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)
