"""The engine options that `headfold build` and `headfold export --target` share, and what both do with them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from headfold.export.engine_options import BuildOptions
    from headfold.export.progress import Reporter

TARGETS = ["tensorrt-rtx", "tensorrt"]


class ComputeCapabilities(click.ParamType):
    """`86,89,120` as numbers."""

    name = "86,89,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType.convert."""
        if isinstance(value, tuple):
            return value
        parts = [
            part.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "") for part in value.split(",")
        ]
        if not all(part.isdigit() for part in parts):
            self.fail(f"{value!r} is no list of compute capabilities like 86,89,120.", param, ctx)
        return tuple(int(part) for part in parts)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """What an engine should be."""
    for option in reversed(
        (
            click.option("--attention", type=click.Choice(["native", "plugin"]), default="native", show_default=True),
            click.option("--sm", type=ComputeCapabilities(), default=(), help="GPUs to build for."),
            click.option("--max-batch", type=int, default=4, show_default=True, help="Most sequences at a time."),
            click.option(
                "--max-input", type=int, default=512, show_default=True, help="Most tokens of a prefill step."
            ),
            click.option("--weight-streaming", is_flag=True, help="Let weights be streamed from host memory."),
            click.option("--workspace", type=int, metavar="MIB", help="Limit of TensorRT's scratch memory."),
            click.option("--timing-cache", type=click.Path(path_type=Path), help="File to read and add timings to."),
        )
    ):
        command = option(command)
    return command


def make_options(target: str, sm: tuple[int, ...], workspace: int | None, **others: Any) -> "BuildOptions":
    """The options of `engine_options`, as parsed."""
    from headfold.export.engine_options import BuildOptions

    scratch = None if workspace is None else workspace << 20
    return BuildOptions(target=target, compute_capabilities=sm, workspace=scratch, **others)  # type: ignore[arg-type]


def check_early(options: "BuildOptions", dtype: str) -> None:
    """Refuse before a long export what `build` would refuse after it. Raises HeadfoldError."""
    from headfold.export.engine_options import check_capabilities
    from headfold.export.tensorrt_network import open_flavour

    check_capabilities(options, dtype)
    open_flavour(options.target)


def build_and_tell(bundle: Path, options: "BuildOptions", reporter: "Reporter") -> dict[str, Any]:
    """Build, and print what each attention became; returns facts for --json."""
    from headfold.export.tensorrt_build import build_engine

    result = build_engine(bundle, options, reporter)
    for layer in result.layers:
        reporter.note(str(layer))
    return {
        "bundle": str(bundle),
        "engine_bytes": result.engine_bytes,
        "engine": result.entry.model_dump(),
        "attention": [vars(layer) for layer in result.layers],
    }
