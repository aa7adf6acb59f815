"""What the commands that run a bundle, or have it run, share: on which engine, and opening it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import rich_click as click

from headfold.export.cli.shared import Command, options, refuse_idle
from headfold.plugins.attention.schema import Attention

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
    click.option(
        "--attention", type=click.Choice(get_args(Attention)), help="Which TensorRT engine. [default: the first]"
    ),
    click.option("--threads", type=click.IntRange(1), help="[default: physical cores]"),
)
DRAFT = click.option(
    "--draft",
    type=click.Path(path_type=Path),
    help="A smaller bundle with the same tokenizer, whose guesses are checked; needs --all-logits. Same answers, sooner.",
)
PREFILL = click.option(
    "--prefill",
    type=click.Path(path_type=Path),
    help="A bundle of the same model that reads prompts faster, as one of --weights w8a8 beside int4; takes the memory of both.",
)


def engine_options(command: Command) -> Command:
    """The command with these."""
    return options(command, *ENGINE)


def refuse_idle_engine(backend: Engine) -> None:
    """Refuse options of the engine that is not asked for. Raises InputError."""
    refuse_idle(
        backend == "tensorrt",
        "provider",
        "threads",
        why="is of ONNX Runtime",
        fix="Leave it out, or --backend onnxruntime.",
    )
    refuse_idle(
        backend != "tensorrt", "attention", why="chooses a TensorRT engine", fix="Leave it out, or --backend tensorrt."
    )


def open_bundle(
    bundle: Path,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
    **options: Any,
) -> "Model":
    """The bundle at work, with other options of the runtime's `load`; what has no effect on it is refused."""
    from headfold.runtime import load

    refuse_idle_engine(backend)
    return load(bundle, backend=backend, provider=provider, attention=attention, threads=threads, **options)
