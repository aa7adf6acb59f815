"""`headfold inspect`: what is in a checkpoint or a bundle."""

from pathlib import Path

import rich_click as click

from headfold.export.cli.shared import JSON, print_json


@click.command()
@click.argument("path", metavar="CHECKPOINT|BUNDLE")
@JSON
def inspect(path: str, as_json: bool) -> None:
    """Show what is in a checkpoint or a bundle: architecture, parameters, heads, bytes of weights and cache, parity.

    **Example**: `headfold inspect smol --json`
    """
    from headfold.export.bundle.inspection import inspect_path, render

    facts = inspect_path(Path(path))
    if as_json:
        print_json(facts)
    else:
        render(facts)
