"""`headfold convert`: fewer key/value heads, a gated feed-forward."""

from pathlib import Path
from typing import Literal

import rich_click as click

from headfold.export.cli.shared import (
    HF_OUTPUT,
    INIT,
    JSON,
    QUIET,
    SOURCE,
    check_file,
    dtype_of,
    print_json,
    refuse_idle,
    reporter_for,
    write_file,
)


@click.command()
@SOURCE
@HF_OUTPUT
@click.option(
    "--kv-heads", type=int, help="Key/value heads to end with: a divisor of the query heads; 1 is multi-query."
)
@INIT
@click.option(
    "--grouping",
    type=click.Choice(["contiguous", "cluster"]),
    default="contiguous",
    show_default=True,
    help="Which query heads share one; cluster reorders them.",
)
@click.option(
    "--ffn", type=click.Choice(["swiglu", "reglu", "geglu"]), help="Turn a plain feed-forward into this gated one."
)
@click.option(
    "--data",
    multiple=True,
    help="Text to calibrate on: file, directory or data set. [default: the model writes its own]",
)
@click.option("--calibration-tokens", type=int, default=8192, show_default=True, help="How many in all.")
@click.option("--calibration-length", type=int, default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the model's own text, and of random.")
@dtype_of("source")
@click.option("--report", type=click.Path(path_type=Path), help="Write the error of each layer here, as JSON.")
@JSON
@QUIET
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

    refuse_idle(
        kv_heads is None,
        *("init", "grouping", "data", "calibration_tokens", "calibration_length", "seed", "report"),
        why="is of the conversion to fewer key/value heads",
        fix="Add --kv-heads, or leave it out.",
    )
    refuse_idle(
        bool(data) and init != "random",
        "seed",
        why="is of the model's own text, and of --init random",
        fix="Leave it out, or leave out --data.",
    )
    options = ConvertOptions(kv_heads, init, grouping, seed) if kv_heads is not None else None
    calibration = Calibration(data, calibration_tokens, calibration_length)
    reporter = reporter_for(quiet)
    target = getattr(torch, dtype) if dtype else None
    if report is not None:
        check_file(report)
    conversion = convert_file(Path(source), output, options, calibration, reporter, target, ffn)
    content = conversion.to_json() if conversion is not None else {}
    if report is not None:
        write_file(report, content)
    if as_json:
        print_json({"checkpoint": str(output)} | content)
        return
    if conversion is not None and not quiet:
        render(conversion, reporter.console)
    click.echo(f"wrote {output}")
