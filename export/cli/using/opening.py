"""What the commands that run a bundle share: on which engine, and opening it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich_click as click

from headfold.export.cli.shared import refuse_idle
from headfold.runtime.errors import InputError

if TYPE_CHECKING:
    from headfold.runtime import Model

Engine = Literal["onnxruntime", "tensorrt"]
ENGINE = (
    click.option(
        "--backend",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="TensorRT runs an engine that `headfold build` put into the bundle.",
    ),
    click.option(
        "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of ONNX Runtime."
    ),
    click.option("--threads", type=click.IntRange(1), help="[default: physical cores]"),
)


def open_bundle(bundle: Path, backend: Engine, provider: str, threads: int | None) -> "Model":
    """The bundle at work; what has no effect on it is refused."""
    from headfold.export.checkpoints.side_files import CONFIG
    from headfold.runtime import load
    from headfold.runtime.manifest import MANIFEST

    if not (bundle / MANIFEST).exists() and (bundle.is_file() or (bundle / CONFIG).exists()):
        raise InputError(
            "is a checkpoint, not a bundle", where=bundle, fix=f"Export it first: headfold export {bundle} -o BUNDLE."
        )
    refuse_idle(
        backend == "tensorrt",
        "provider",
        "threads",
        why="is of ONNX Runtime",
        fix="Leave it out, or --backend onnxruntime.",
    )
    return load(bundle, backend=backend, provider=provider, threads=threads)
