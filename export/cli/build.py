"""The command `headfold build`: thin, like those of cli.py, which registers it."""

import json
from pathlib import Path
from typing import Any

import rich_click as click

from headfold.export.cli.engine import TARGETS, build_and_tell, engine_options, make_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), default="tensorrt-rtx", show_default=True)
@engine_options
@click.option("--capacity", type=int, help="Positions of the engine's KV cache. [default: the bundle's]")
@click.option("--force", is_flag=True, help="Replace an engine of the same kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
def build(bundle: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Build a TensorRT engine from BUNDLE and put it there. TensorRT-RTX needs no GPU for that.

    **Examples**

    `headfold build smol-fp16 --sm 86,89,120`

    `headfold build smol-fp16 --sm 86,89,120 --attention plugin --max-batch 8 --capacity 4096`
    """
    from headfold.export.progress import Reporter

    facts = build_and_tell(bundle, make_options(**options), Reporter(quiet=quiet))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    entry = facts["engine"]
    click.echo(f"wrote {bundle / entry['file']} for SM {', '.join(map(str, entry['compute_capabilities']))}")


COMMANDS = (build,)
