"""The command that converts: fewer key/value heads, a gated feed-forward. Thin, as in cli.py."""

import json
from pathlib import Path
from typing import Literal

import rich_click as click

from headfold.runtime.errors import CheckpointError


@click.command()
@click.argument("source", metavar="CHECKPOINT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Hugging Face directory to make.")
@click.option(
    "--kv-heads", type=int, help="Key/value heads to end with: a divisor of the query heads; 1 is multi-query."
)
@click.option(
    "--init",
    default="svd",
    show_default=True,
    metavar="[svd|procrustes|mean|first|random]",
    help="How a group's key/value head starts. mean, first, random: Ainslie et al. 2023.",
)
@click.option(
    "--grouping",
    default="contiguous",
    show_default=True,
    metavar="[contiguous|cluster]",
    help="Which query heads share one; cluster reorders them.",
)
@click.option("--ffn", help="Turn a plain feed-forward into this gated one: swiglu, reglu, geglu.")
@click.option(
    "--data",
    multiple=True,
    help="Text to calibrate on: file, directory or data set. [default: the model writes its own]",
)
@click.option("--calibration-tokens", type=int, default=8192, show_default=True)
@click.option("--calibration-length", type=int, default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the model's own text, and of random.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the output. [default: the source's]"
)
@click.option("--report", type=click.Path(path_type=Path), help="Write the error of each layer here, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
def convert(
    source: str,
    output: Path,
    kv_heads: int | None,
    init: Literal["random", "first", "mean", "procrustes", "svd"],
    grouping: Literal["contiguous", "cluster"],
    ffn: str | None,
    data: tuple[str, ...],
    calibration_tokens: int,
    calibration_length: int,
    seed: int,
    dtype: str | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert CHECKPOINT to fewer key/value heads, as close to the original as one step gets; then `headfold uptrain` it.

    The result is a plain checkpoint that transformers and every headfold command loads.

    **Examples**

    `headfold convert ./Llama-2-7b -o llama-gqa8 --kv-heads 8`

    `headfold convert ./SmolLM2-135M-Instruct -o smol-mqa --kv-heads 1 --data corpus.txt --report errors.json`
    """
    import torch

    from headfold.export.conversion.checkpoint import Calibration, convert_file, render
    from headfold.export.conversion.layers import ConvertOptions
    from headfold.export.progress import Reporter

    options = ConvertOptions(kv_heads, init, grouping, seed) if kv_heads is not None else None
    calibration = Calibration(data, calibration_tokens, calibration_length)
    reporter = Reporter(quiet=quiet)
    target = getattr(torch, dtype) if dtype else None
    if report is not None and not report.absolute().parent.is_dir():
        raise CheckpointError("is no directory", where=report.absolute().parent, fix="Create it first.")
    conversion = convert_file(Path(source), output, options, calibration, reporter, target, ffn)
    content = conversion.to_json() if conversion is not None else {}
    if report is not None:
        report.write_text(json.dumps(content, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps({"checkpoint": str(output)} | content, indent=2))
        return
    if conversion is not None and not quiet:
        render(conversion, reporter.console)
    click.echo(f"wrote {output}")


COMMANDS = (convert,)
