"""`headfold verify`: a bundle against its checkpoint."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import rich_click as click

from headfold.export.cli.shared import (
    BASE,
    BUNDLE,
    JSON,
    QUIET,
    REMOTE_CODE,
    STEPS,
    print_json,
    refuse_idle,
    reporter_for,
)
from headfold.plugins.attention.schema import Attention

if TYPE_CHECKING:
    from headfold.export.exportables.base import Exportable
    from headfold.export.parity.compare import Candidate
    from headfold.runtime.manifest import Manifest


@click.command()
@BUNDLE
@click.option("--against", "source", required=True, metavar="CHECKPOINT", help="What the bundle was exported from.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt-network"]),
    default="onnxruntime",
    show_default=True,
    help="tensorrt-network runs the network that TensorRT parsed, on the CPU.",
)
@click.option(
    "--attention",
    type=click.Choice(get_args(Attention)),
    help="Of the TensorRT network. [default: native]",
)
@STEPS
@BASE
@REMOTE_CODE
@JSON
@QUIET
def verify(
    bundle: Path,
    source: str,
    backend: str,
    attention: Attention | None,
    decode_steps: int,
    base: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare BUNDLE with its checkpoint in PyTorch. Exit code 1 if they differ by more than the tolerance.

    **Examples**

    `headfold verify smol --against ./SmolLM2-135M-Instruct`

    `headfold verify smol --against ./SmolLM2-135M-Instruct --backend tensorrt-network --attention plugin`
    """
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.parity.rendering import render
    from headfold.export.parity.verify import verify as verify_against

    candidate = None
    refuse_idle(
        backend == "onnxruntime", "attention", why="is of TensorRT networks", fix="Add --backend tensorrt-network."
    )
    if backend == "tensorrt-network":
        from headfold.export.engine.network_runner import network_candidate
        from headfold.export.engine.options import BuildOptions

        def candidate(manifest: "Manifest") -> "Candidate":
            return network_candidate(bundle, manifest, BuildOptions(attention=attention or "native"))

    reporter = reporter_for(quiet)

    def opened(manifest: "Manifest") -> "Exportable":
        return open_exportable(Path(source), manifest.road, trust_remote_code, reporter, base)

    report = verify_against(bundle, opened, decode_steps, reporter, candidate)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        render(report, reporter.console)
    if not report.passed:
        click.echo(f"headfold: error: {bundle}: {report.failure()}", err=True)
        sys.exit(1)
