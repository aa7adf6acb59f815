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
@click.option(
    "--data",
    multiple=True,
    help="Also measure on this text what rounded weights cost. Exit code 1 if it is more than the export allowed.",
)
@click.option(
    "--prefill",
    type=click.Path(path_type=Path),
    help="With --data: this other bundle of the same model reads the first half of each text, as `generate --prefill` has it.",
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
    data: tuple[str, ...],
    prefill: Path | None,
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

    `headfold verify smol-int4 --against ./SmolLM2-135M-Instruct --data questions.txt`
    """
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.parity.rendering import render
    from headfold.export.parity.verify import verify as verify_against
    from headfold.runtime.manifest import read_manifest

    candidate = None
    refuse_idle(
        backend == "onnxruntime", "attention", why="is of TensorRT networks", fix="Add --backend tensorrt-network."
    )
    if backend == "tensorrt-network":
        from headfold.export.engine.network_runner import network_candidate
        from headfold.export.engine.options import BuildOptions

        def candidate(manifest: "Manifest") -> "Candidate":
            return network_candidate(bundle, manifest, BuildOptions(attention=attention or "native"))

    own = read_manifest(bundle)
    refuse_idle(own.weights is None, "data", why=f"is for rounded weights, and {bundle} has none", fix="Leave it out.")
    refuse_idle(not data, "prefill", why="is for what weights cost on text", fix="Add --data.")
    reporter = reporter_for(quiet)

    def opened(manifest: "Manifest") -> "Exportable":
        return open_exportable(Path(source), manifest.road, trust_remote_code, reporter, base)

    if data:  # first: what is wrong with it is known before the work is done
        from headfold.export.data.token_data import tokenize

        model = opened(own)
        tokenize(data, model.tokenizer.definition, model.facts, reporter)
    report = verify_against(bundle, opened, decode_steps, reporter, candidate)
    cost = None
    if data:
        from headfold.export.bundle.cost_on_text import cost_on_text, refuse_over

        cost = cost_on_text(bundle, own, model, data, reporter, prefill)
    if as_json:
        print_json(report.to_json() | ({"weights_cost": cost.model_dump()} if cost is not None else {}))
    elif not quiet:
        render(report, reporter.console)
    if not report.passed:
        click.echo(f"headfold: error: {bundle}: {report.failure()}", err=True)
        sys.exit(1)
    if cost is not None:
        refuse_over(cost, own, bundle, data)
