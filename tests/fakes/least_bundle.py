"""The least that is a bundle: one cache, and a graph that nobody can load."""

from pathlib import Path

from headfold.export.bundle.writer import manifest_of, write_json
from headfold.plugins.names import caches
from headfold.runtime.manifest import Manifest


def fill(stage: Path, vocab_size: int) -> Manifest:
    """Make it of a directory."""
    (stage / "model.onnx").write_bytes(b"graph")
    fields = {"format_version": 1, "headfold_version": "0", "source": "s", "config": {}, "parameters": 1}
    specs = [
        [{"name": name, "dtype": "float32", "shape": [1]} for name in names]
        for names in (caches(1), caches(1).values())
    ]
    more = {"dtype": "float32", "logits": "last", "inputs": specs[0], "outputs": specs[1], "tools": {}, "parity": None}
    cache = {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 1, "capacity": 1}
    manifest = manifest_of(stage, vocab_size=vocab_size, cache=cache, **fields, **more)
    write_json(stage / "manifest.json", manifest.model_dump())
    return manifest
