"""JSON files that nobody vouches for: their size is bounded before they are read, and whatever is wrong with them is one line."""

import json
from pathlib import Path
from typing import Any

from headfold.runtime.errors import HeadfoldError

MANIFEST_BYTES = 32 << 20  # a thousand layers take 1 MiB
RECORD_BYTES = 16 << 20  # of rounded weights
SETTINGS_BYTES = 16 << 20  # the largest tokenizer_config.json we know has 4 MiB, for its list of added tokens


def read_object(path: Path, most: int, error: type[HeadfoldError], fix: str) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes.

    Raises:
        error: it is larger, is not JSON, is nested so deeply that Python's parser gives up, or is no object.
    """
    check_size(path, most, error, fix)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as reason:
        raise error(f"is not JSON: {reason}", where=path, fix=fix) from reason
    except RecursionError as reason:
        raise error("is nested too deeply", where=path, fix=fix) from reason
    if not isinstance(content, dict):
        raise error("is no JSON object", where=path, fix=fix)
    return content


def check_size(path: Path, most: int, error: type[HeadfoldError], fix: str) -> None:
    """Refuse a file of more than `most` bytes. Raises `error`."""
    size = path.stat().st_size
    if size > most:
        raise error(f"has {size:,} bytes, and at most {most:,} are read", where=path, fix=fix)
