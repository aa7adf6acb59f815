"""`headfold package`: a bundle with what other people's servers want around it."""

from pathlib import Path
from typing import Any

import rich_click as click

from headfold.export.cli.shared import BUNDLE, JSON, print_json
from headfold.export.cli.using.opening import engine_options, refuse_idle_engine


@click.command()
@BUNDLE
@click.option(
    "--for",
    "server",
    type=click.Choice(["triton", "kserve"]),
    required=True,
    help="triton: a model of NVIDIA Triton's repository; kserve: a Dockerfile and an InferenceService.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory to put it in, under its name: Triton's model repository, say.",
)
@click.option("--name", help="Of the model there. [default: the bundle's]")
@engine_options
@JSON
def package(bundle: Path, server: str, output: Path, name: str | None, as_json: bool, **serving: Any) -> None:
    """Write what NVIDIA Triton or KServe needs to serve BUNDLE, with a copy of it.

    **Examples**

    `headfold package smol --for triton -o model_repository`

    `headfold package smol-fp16 --for kserve --provider cuda -o deploy`
    """
    from headfold.export.packaging.kserve import kserve
    from headfold.export.packaging.package import Serving
    from headfold.export.packaging.package import package as write
    from headfold.export.packaging.triton import triton

    refuse_idle_engine(serving["backend"])
    made = write(bundle, output, {"triton": triton, "kserve": kserve}[server], name, Serving(**serving))
    if as_json:
        print_json({"package": str(made), "for": server, "name": made.name})
    else:
        click.echo(f"wrote {made}")
