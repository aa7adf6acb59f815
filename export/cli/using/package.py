"""`headfold package`: a bundle with what other people's servers want around it."""

from pathlib import Path
from typing import Any, get_args

import rich_click as click

from headfold.export.cli.shared import BUNDLE, JSON, print_json, refuse_idle
from headfold.plugins.attention.schema import Attention


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
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="Runs it.",
)
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of ONNX Runtime."
)
@click.option("--attention", type=click.Choice(get_args(Attention)), help="Which TensorRT engine. [default: the first]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of the CPU. [default: one per core]")
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

    tensorrt = serving["backend"] == "tensorrt"
    refuse_idle(not tensorrt, "attention", why="chooses a TensorRT engine", fix="Add --backend tensorrt.")
    refuse_idle(tensorrt, "provider", "threads", why="is of ONNX Runtime", fix="Leave it out.")
    made = write(bundle, output, {"triton": triton, "kserve": kserve}[server], name, Serving(**serving))
    if as_json:
        print_json({"package": str(made), "for": server, "name": made.name})
    else:
        click.echo(f"wrote {made}")
