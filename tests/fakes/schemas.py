"""Files of other people's packages that tests hold our output against; scripts/test puts them into .venv-schemas."""

from pathlib import Path

import pytest


def schema(path: str) -> Path:
    """A file of a package there."""
    found = list((Path(__file__).parents[2] / ".venv-schemas").glob(f"lib/python*/site-packages/{path}"))
    if not found:
        pytest.skip(f"{path} is missing: scripts/test fetches it")
    return found[0]
