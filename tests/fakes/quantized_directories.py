"""Hugging Face directories whose linear layers are quantized, made from one that is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantized_weights import Stored
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")
Store = Callable[[Tensor], Stored]


def quantize(source: Path, directory: Path, settings: dict[str, Any], store: Store) -> dict[str, Tensor]:
    """The toy with its linear layers quantized; what they are exactly, by name."""
    shutil.copytree(source, directory)
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if LINEAR.search(name)]:
        parts, expected[name] = store(tensors.pop(name))
        tensors |= {name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    configure(directory, quantization_config=settings)
    return expected


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
