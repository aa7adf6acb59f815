"""Hugging Face directories from the hub, into its cache."""

from glob import escape
from pathlib import Path

from headfold.export.checkpoints.directories.stored import shards_of
from headfold.export.checkpoints.side_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
)
from headfold.runtime.errors import CheckpointError


def is_hub_name(path: Path) -> bool:
    """Whether it looks like `organisation/name`."""
    return len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in {".", ".."}


def download(name: str, revision: str | None = None) -> Path:
    """Fetch `organisation/name` from the Hugging Face hub into its cache: configuration, tokenizer, and the weights it names.

    A single file of weights is taken where there is one, otherwise those that the index names: nothing else that lies there.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, SINGLE, INDEX, ADAPTER_CONFIG, ADAPTER, *TOKENIZER_FILES]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if (path / INDEX).is_file() and not (path / SINGLE).is_file():
            shards = sorted(set(shards_of(path / INDEX).values()))
            snapshot_download(name, revision=path.name, allow_patterns=[escape(shard) for shard in shards])
    except CheckpointError:
        raise
    except Exception as error:  # whatever its HTTP client raises: it has changed clients twice
        raise CheckpointError(
            f"is no file here and cannot be fetched from the hub: {error}",
            where=name,
            fix="Download it, and name its directory.",
        ) from error
    return path
