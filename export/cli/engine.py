"""The engine options that `headfold build` and `headfold export --target` share, and what both do with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import rich_click as click

from headfold.export.cli.shared import Command, options
from headfold.plugins.attention.schema import Attention
from headfold.plugins.tensorrt_library import Flavour

if TYPE_CHECKING:
    from headfold.export.engine.options import BuildOptions
    from headfold.export.progress import Reporter
    from headfold.runtime.manifest import WeightsScheme

TARGETS = get_args(Flavour)
ENGINE = ("attention", "sm", "max_batch", "max_input", "weight_streaming", "workspace", "timing_cache")  # parameters


def _capabilities(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """`86,89,120` as numbers."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of compute capabilities like 86,89,120.")
    return tuple(map(int, parts))


def engine_options(command: Command) -> Command:
    """What an engine should be."""
    return options(
        command,
        click.option(
            "--attention",
            type=click.Choice(get_args(Attention)),
            default="native",
            show_default=True,
            help="TensorRT's own layers, or headfold's plugin with its kernels.",
        ),
        click.option("--sm", default="", callback=_capabilities, metavar="86,89,...", help="GPUs to build for."),
        click.option("--max-batch", type=int, default=4, show_default=True, help="Most sequences at a time."),
        click.option("--max-input", type=int, help="Most tokens of a prefill step. [default: 512, or the capacity]"),
        click.option("--weight-streaming", is_flag=True, help="Let weights be streamed from host memory."),
        click.option("--workspace", type=int, metavar="MIB", help="Limit of TensorRT's scratch memory."),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path),
            help="File to read and add timings to; for tensorrt alone.",
        ),
    )


def make_options(target: str, sm: tuple[int, ...], workspace: int | None, **others: Any) -> "BuildOptions":
    """The options of `engine_options`, as parsed."""
    from headfold.export.engine.options import BuildOptions

    scratch = None if workspace is None else workspace << 20
    return BuildOptions(target=target, compute_capabilities=sm, workspace=scratch, **others)  # type: ignore[arg-type]


def check_early(
    options: "BuildOptions", dtype: str, kv_cache: str | None, weights: "WeightsScheme | None" = None
) -> None:
    """Refuse before a long export what `build` would refuse after it. Raises HeadfoldError."""
    from headfold.export.engine.network_report import open_flavour
    from headfold.export.engine.options import check_cache, check_flavour, check_weights

    check_flavour(options, dtype)
    if weights is not None:
        check_weights(options, weights)
    if kv_cache is not None:
        check_cache(options, kv_cache)
    open_flavour(options.target)


def build_and_tell(bundle: Path, options: "BuildOptions", reporter: "Reporter") -> dict[str, Any]:
    """Build, and print what each attention became; returns facts for --json."""
    from headfold.export.engine.build import build_engine

    result = build_engine(bundle, options, reporter)
    for layer in result.layers:
        reporter.note(str(layer))
    return {
        "bundle": str(bundle),
        "engine_bytes": result.engine_bytes,
        "engine": result.entry.model_dump(),
        "attention": [vars(layer) for layer in result.layers],
    }
