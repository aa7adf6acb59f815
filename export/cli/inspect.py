"""`headfold inspect`: what is in a checkpoint or a bundle; `headfold families`: what tests try."""

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from headfold.export.cli.shared import BASE, JSON, REMOTE_CODE, VIA, print_json, refuse_idle

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

    Of a checkpoint also what its weights are quantized in, what it is an adapter of, and what it can become: targets of `export` and
    `build`, cache and weights of fewer bits, other commands; for what it cannot, why.
    Of a bundle's files the sizes are checked, but not the hashes: `headfold verify` and whoever loads it do that.

    **Example**: `headfold inspect smol --json`
    """
    from headfold.export.bundle.inspection import inspect_checkpoint, inspect_path, render, render_targets
    from headfold.runtime.manifest import MANIFEST

    bundle = (Path(path) / MANIFEST).exists()
    refuse_idle(
        bundle,
        "via",
        "trust_remote_code",
        "base",
        why="is of checkpoints, and this is a bundle",
        fix="Leave it out.",
    )
    if bundle:
        facts = inspect_path(Path(path))
        print_json(facts) if as_json else render(facts)
        return
    from headfold.export.engine.targets import targets_of
    from headfold.export.exportables.opening import open_exportable

    exportable = open_exportable(Path(path), via, trust_remote_code, base=base)
    facts = inspect_checkpoint(exportable)
    if not as_json:
        render(facts)  # at once: what follows takes some seconds
    targets = [vars(target) for target in targets_of(exportable, base)]
    if as_json:
        print_json(facts | {"can_become": targets})
    else:
        click.echo()
        render_targets(targets)


@click.command()
@click.option("--markdown", is_flag=True, help="The table that README has.")
@JSON
def families(markdown: bool, as_json: bool) -> None:
    """List the model types that tests try, and how deeply: as a random model, with real weights, as a network of TensorRT.

    Other types that transformers knows are not refused for being new: each export proves itself.

    **Example**: `headfold families --json`
    """
    from headfold.export.bundle.inspection import render_families
    from headfold.export.exportables import tried

    if as_json:
        print_json([row.to_json() for row in tried.TRIED])
    elif markdown:
        click.echo(tried.markdown())
    else:
        render_families()
