"""`headfold inspect`: what is in a checkpoint or a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from headfold.export.cli.shared import BASE, JSON, REMOTE_CODE, VIA, print_json

if TYPE_CHECKING:
    from headfold.runtime.manifest import Road


@click.command()
@click.argument("path", metavar="CHECKPOINT|BUNDLE")
@BASE
@VIA
@REMOTE_CODE
@JSON
def inspect(path: str, base: Path | None, via: "Road | None", trust_remote_code: bool, as_json: bool) -> None:
    """Show what is in a checkpoint or a bundle: its road, architecture, parameters, heads, bytes of weights and cache, parity.

    Of a checkpoint also what its weights are quantized in, and what it is an adapter of.

    **Example**: `headfold inspect smol --json`
    """
    from headfold.export.bundle.inspection import inspect_path, render

    facts = inspect_path(Path(path), via, trust_remote_code, base)
    if as_json:
        print_json(facts)
    else:
        render(facts)
