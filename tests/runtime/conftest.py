"""A toy bundle made by the real exporter, ways to change it, and a TensorRT session over the fakes on it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorrt_rig import Rig, copy_with_engine

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.bundle.writer import manifest_of, write_json
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter


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

    def logits(self, ids: Any) -> np.ndarray:
        """The oracle's logits [S, V] of token ids [S], without a cache."""
        return self.decoder(torch.tensor(np.asarray(ids))[None]).logits[0].numpy()


@pytest.fixture(scope="session")
def make_toy(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Callable[..., Toy]:
    """Exports the toy; each kind is exported once."""
    made: dict[tuple[object, ...], Toy] = {}

    def make(all_logits: bool = False, dtype: Any = "float32", hidden_states: bool = False) -> Toy:
        kind = (all_logits, dtype, hidden_states)
        if kind not in made:
            path = tmp_path_factory.mktemp("bundle") / "toy"
            options = ExportOptions(dtype=dtype, all_logits=all_logits, hidden_states=hidden_states, verify=False)
            export_bundle(open_exportable(toy_checkpoint), path, options, Reporter(quiet=True))
            decoder = load_decoder(open_checkpoint(toy_checkpoint))
            made[kind] = Toy(path, decoder, decoder.config)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy()


@pytest.fixture(scope="session")
def prompts(toy: Toy) -> list[np.ndarray]:
    """Token ids of three lengths, the middle one the shortest."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, toy.config.vocab_size, length) for length in (7, 3, 12)]


@pytest.fixture
def changed(toy: Toy, tmp_path: Path) -> Callable[..., Path]:
    """Copies the toy's bundle with other side files, and a manifest that is right for them; None removes a file."""

    def change(files: dict[str, dict[str, Any] | str | bytes | None], **fields: Any) -> Path:
        path = tmp_path / "changed"
        path.mkdir()
        for source in toy.path.iterdir():
            if source.name not in files:
                (path / source.name).write_bytes(source.read_bytes())
        for name, content in files.items():
            if content is not None:
                text = json.dumps(content) if isinstance(content, dict) else content
                (path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        manifest = json.loads((toy.path / "manifest.json").read_text()) | fields
        (path / "manifest.json").unlink(missing_ok=True)
        del manifest["files"]
        write_json(path / "manifest.json", manifest_of(path, **manifest).model_dump())
        return path

    return change


@pytest.fixture
def with_engine(make_toy: Callable[..., Toy], tmp_path: Path) -> Callable[..., Path]:
    """Copies the toy's bundle and adds an engine to it; see `copy_with_engine`."""

    def make(all_logits: bool = False, **changes: Any) -> Path:
        return copy_with_engine(make_toy(all_logits).path, tmp_path / "bundle", **changes)

    return make


@pytest.fixture
def rig(with_engine: Callable[..., Path], toy: Toy) -> Rig:
    return Rig(with_engine(), toy.decoder)
