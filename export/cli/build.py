"""`headfold build`: an engine into a bundle."""

from pathlib import Path
from typing import Any

import rich_click as click

from headfold.export.cli.engine import TARGETS, build_and_tell, engine_options, make_options
from headfold.export.cli.shared import BUNDLE, JSON, QUIET, print_json, reporter_for


@click.command()
@BUNDLE
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="tensorrt-rtx",
    show_default=True,
    help="TensorRT-RTX builds for many GPUs anywhere, TensorRT for the one it runs on.",
)
@engine_options
@click.option("--capacity", type=int, help="Positions of the engine's KV cache. [default: the bundle's]")
@click.option("--force", is_flag=True, help="Replace an engine of the same kind.")
@JSON
@QUIET
def build(bundle: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Build a TensorRT engine from BUNDLE and put it there. TensorRT-RTX needs no GPU for that.

    **Examples**

    `headfold build smol-fp16 --sm 86,89,120`

    `headfold build smol-fp16 --sm 86,89,120 --attention plugin --max-batch 8 --capacity 4096`
    """
    facts = build_and_tell(bundle, make_options(**options), reporter_for(quiet))
    if as_json:
        print_json(facts)
        return
    entry = facts["engine"]
    click.echo(f"wrote {bundle / entry['file']} for SM {', '.join(map(str, entry['compute_capabilities']))}")
