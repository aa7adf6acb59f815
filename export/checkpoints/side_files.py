"""The files beside the weights of a Hugging Face directory: JSON, tokenizer, settings; bounded, no pointers, nothing from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headfold.runtime.errors import CheckpointError
from headfold.runtime.files.json_file import check_size, read_object

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_JSON_BYTES, _SIDE_BYTES = 64 << 20, 256 << 20  # at most; the largest tokenizer.json we know has 33 MB
_POINTER = b"version https://git-lfs.github.com/spec/"
_AGAIN = "Download it again."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, too large, a pointer of Git LFS, or is no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"has no {path.name}", where=path.parent, fix="Name a Hugging Face directory.")
    refuse_pointer(path)
    return read_object(path, _JSON_BYTES, CheckpointError, _AGAIN)


def side_files(directory: Path) -> Mapping[str, bytes]:
    """Tokenizer and generation files by name.

    Raises:
        CheckpointError: one is too large, a pointer of Git LFS, or a link that leads out of the checkpoint.
    """
    found = {}
    for name in TOKENIZER_FILES:
        path = directory / name
        if not path.is_file():
            continue
        refuse_pointer(path)
        if path.is_symlink() and not _inside(path.resolve(), directory.resolve()):
            raise CheckpointError(
                "is a link that leads out of the checkpoint", where=path, fix="Copy the file to its place."
            )
        check_size(path, _SIDE_BYTES, CheckpointError, _AGAIN)
        found[name] = path.read_bytes()
    return found


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if a file is what Git LFS left in place of it."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                "is a pointer of Git LFS, not the file itself", where=path, fix="Run `git lfs pull` in that checkout."
            )


def _inside(target: Path, directory: Path) -> bool:
    """Whether a file is the checkpoint's own; in the hub's cache, snapshots/REVISION links to blobs/ of the same model."""
    if target.is_relative_to(directory):
        return True
    return directory.parent.name == "snapshots" and target.parent == directory.parent.parent / "blobs"
