"""The commands that train: `headfold uptrain`, `sweep` and `study`."""

import sys
from pathlib import Path
from typing import Any, Literal

import rich_click as click

from headfold.export.cli.shared import (
    HF_OUTPUT,
    INIT,
    JSON,
    NUMBER,
    QUIET,
    SOURCE,
    Command,
    Range,
    check_file,
    dtype_of,
    options,
    print_json,
    refuse_idle,
    reporter_for,
    write_file,
)
from headfold.plugins.dtypes import FLOATS, DType
from headfold.runtime.errors import InputError


def corpus_options(command: Command) -> Command:
    """What text to train on."""
    return options(
        command,
        click.option(
            "--data",
            multiple=True,
            required=True,
            help="Text, JSONL or parquet file, a directory of them, or a data set's name[:config[:split]]; may be repeated.",
        ),
        click.option("--validation", multiple=True, help="Data to validate on. [default: the end of --data]"),
        click.option("--holdout", type=NUMBER, default=0.01, show_default=True, help="Share of --data to validate on."),
        click.option("--text-field", default="text", show_default=True, help="Column that holds the text."),
        click.option("--cache", type=click.Path(path_type=Path), help="Where tokenized data is kept."),
    )


def training_options(command: Command) -> Command:
    """How to train."""
    return options(
        command,
        click.option("--loss", type=click.Choice(["ce", "kl", "kl+ce"]), help="[default: kl with a teacher, else ce]"),
        click.option("--ce-weight", type=NUMBER, default=0.5, show_default=True, help="Share of ce in kl+ce."),
        click.option("--batch", type=int, default=8, show_default=True, help="Sequences per step, over all processes."),
        click.option(
            "--micro-batch", type=int, help="Sequences per forward pass; the rest is accumulated. [default: all]"
        ),
        click.option("--sequence", type=int, default=512, show_default=True, help="Tokens."),
        click.option("--learning-rate", type=NUMBER, default=3e-4, show_default=True, help="At its peak."),
        click.option("--warmup", type=NUMBER, default=0.05, show_default=True, help="Share of the steps."),
        click.option("--weight-decay", type=NUMBER, default=0.1, show_default=True, help="Of AdamW, on matrices."),
        click.option("--clip", type=NUMBER, default=1.0, show_default=True, help="Largest norm of the gradient."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the data."),
        click.option("--bf16", is_flag=True, help="Compute in bfloat16; weights stay float32."),
        click.option("--activation-checkpointing", is_flag=True, help="Less memory, about a third more time."),
        click.option(
            "--max-spike", type=NUMBER, default=2.0, show_default=True, help="Rise of the loss in nats that stops."
        ),
        click.option("--cpu", is_flag=True, help="Even if there is a GPU."),
    )


@click.command()
@click.argument("student", metavar="STUDENT")
@HF_OUTPUT
@click.option("--teacher", metavar="CHECKPOINT", help="What the student was converted from.")
@click.option("--tokens", type=int, help="How many to train on.")
@click.option("--alpha", type=NUMBER, help="How many, as a share of --pretrain-tokens; the paper's is 0.05.")
@click.option("--pretrain-tokens", type=NUMBER, help="How many the model was pretrained on; 2e12 is a number, too.")
@corpus_options
@training_options
@click.option("--evaluate-every", type=int, default=0, show_default=True, help="Steps; 0: only before and after.")
@click.option("--checkpoint-every", type=int, default=500, show_default=True, help="Steps; 0: only at the end.")
@click.option("--keep", type=int, default=2, show_default=True, help="Checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUTPUT.training, if there is one.")
@dtype_of("student")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Directory for its logs.")
@JSON
@QUIET
def uptrain(
    student: str,
    output: Path,
    teacher: str | None,
    tokens: int | None,
    alpha: float | None,
    pretrain_tokens: float | None,
    resume: bool,
    dtype: DType | None,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Train STUDENT for a share of its pretraining, so that it recovers what its conversion lost.

    Checkpoints and log.jsonl are written to OUTPUT.training; a run that was stopped, however, goes on with --resume and ends with
    the same weights. On several GPUs or machines: `accelerate launch -m headfold.export uptrain …`; in several processes on CPUs:
    `torchrun --nproc_per_node 2 -m headfold.export uptrain … --cpu`

    **Example**

    `headfold uptrain smol-mqa --teacher SmolLM2-135M-Instruct --data corpus.jsonl --alpha 0.001 --pretrain-tokens 2e12 -o smol-up`
    """
    import torch
    from accelerate import PartialState

    from headfold.export.training.uptrain import Budget, run_directory
    from headfold.export.training.uptrain import uptrain as run

    refuse_idle(rest["loss"] == "ce", "teacher", why="is of the losses kl and kl+ce", fix="Leave it out, or --loss kl.")
    refuse_idle(
        rest["checkpoint_every"] == 0 and not resume,
        "keep",
        why="is of checkpoints on the way, and --checkpoint-every 0 makes none",
        fix="Leave one of them out.",
    )
    corpus, options = _split(rest, teacher is not None)
    budget = Budget(tokens, alpha, None if pretrain_tokens is None else round(pretrain_tokens))
    result = run(
        Path(student),
        output,
        corpus,
        options,
        budget,
        reporter_for(quiet),
        teacher=Path(teacher) if teacher else None,
        dtype=getattr(torch, dtype) if dtype else None,
        resume=resume,
    )
    if not PartialState().is_main_process:
        return
    evaluations = [vars(evaluation) for evaluation in result.evaluations]
    if as_json:
        content = {"output": str(output), "training": str(run_directory(output)), "tokens": result.tokens}
        print_json(content | {"evaluations": evaluations})
        return
    if evaluations:
        click.echo(f"validation loss {evaluations[0]['loss']:.4f} -> {evaluations[-1]['loss']:.4f} nats per token")
    click.echo(f"wrote {output}")


@click.command()
@SOURCE
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option(
    "--kv-heads",
    required=True,
    metavar="N,N,…",
    help="Numbers of key/value heads to try; the checkpoint's own always is.",
)
@INIT
@click.option("--tokens", type=int, help="How many to train each on.")
@click.option("--alpha", type=NUMBER, help="How many, as a share of --pretrain-tokens; the paper's is 0.05.")
@click.option("--pretrain-tokens", type=NUMBER, help="How many the model was pretrained on.")
@corpus_options
@training_options
@click.option("--evaluate-every", type=int, default=0, help="Steps. [default: an eighth of all]")
@click.option("--evaluate-sequences", type=int, default=64, show_default=True, help="To validate on.")
@click.option("--control/--no-control", default=True, show_default=True, help="Also train the original on, as long.")
@click.option(
    "--baseline", is_flag=True, help="Also the paper's recipe: mean pooling and ce, 5 % of --pretrain-tokens."
)
@click.option("--memory", default="8GiB", show_default=True, help="What weights and cache may take.")
@click.option(
    "--contexts", metavar="N,N,…", help="Tokens before the ones that are timed. [default: 512,2048,8192 or what fits]"
)
@click.option(
    "--cache-dtype",
    type=click.Choice(FLOATS),
    default="float32",
    show_default=True,
    help="Of weights and cache, when they are timed and counted.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of timing.")
@click.option("--threads", type=click.IntRange(1), help="Of timing. [default: physical cores]")
@click.option("--budget-kv-bytes", type=int, help="Pick the best count whose cache per token takes no more.")
@click.option("--max-loss", type=NUMBER, help="Pick the smallest count whose validation loss is no higher.")
@click.option("--resume", is_flag=True, help="Go on in OUTPUT; finished runs are not repeated.")
@JSON
@QUIET
def sweep(
    source: str,
    output: Path,
    kv_heads: str,
    init: Literal["random", "first", "mean", "procrustes", "svd"],
    tokens: int | None,
    alpha: float | None,
    pretrain_tokens: float | None,
    control: bool,
    baseline: bool,
    memory: str,
    contexts: str | None,
    cache_dtype: DType,
    rounds: int,
    threads: int | None,
    budget_kv_bytes: int | None,
    max_loss: float | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Convert CHECKPOINT to several numbers of key/value heads, uptrain each from the original, and show what each costs and gains.

    OUTPUT gets report.html (one page, no network needed), report.json, and every uptrained checkpoint as kv-N. Exit code 1 if a
    choice was asked for and no count qualifies.

    **Example**

    `headfold sweep ./model --kv-heads 1,2,4 --data corpus.txt --alpha 0.005 --pretrain-tokens 12e6 --max-loss 1.40 -o sweep`
    """
    from rich.console import Console

    from headfold.export.checkpoints.opening import open_own
    from headfold.export.studies.sweep import SweepOptions, unpicked
    from headfold.export.studies.sweep import sweep as run
    from headfold.export.studies.sweep_report import render_table, write_report
    from headfold.export.training.uptrain import Budget

    rest |= {"checkpoint_every": 0, "keep": 1, "tensorboard": None}
    corpus, training = _split(rest, taught=True)
    counts = _numbers("--kv-heads", kv_heads)
    alone = {open_own(Path(source)).config.num_key_value_heads}.issuperset(counts)
    refuse_idle(
        alone, "init", "loss", "baseline", why="is of other counts", fix="Add one to --kv-heads, or leave it out."
    )
    budget = Budget(tokens, alpha, None if pretrain_tokens is None else round(pretrain_tokens))
    options = SweepOptions(
        kv_heads=counts,
        init=init,
        contexts=_numbers("--contexts", contexts) if contexts else (),
        memory=_bytes(memory),
        dtype=cache_dtype,
        control=control,
        baseline=baseline,
        budget_kv_bytes=budget_kv_bytes,
        max_loss=max_loss,
        rounds=rounds,
        threads=threads,
    )
    reporter = reporter_for(quiet)
    report = run(Path(source), output, corpus, training, budget, options, reporter, resume)
    page = write_report(report, output)
    if as_json:
        print_json(report.to_json())
    else:
        render_table(report, Console(highlight=False))
        click.echo(f"wrote {page}")
    if unpicked(report.choice, options):
        click.echo(f"headfold: error: {report.choice.reason}", err=True)
        sys.exit(1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"{option} is {text!r}", fix="Give whole numbers with commas between, such as 1,2,4."
        ) from error
    return numbers


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise InputError(f"--memory is {text!r}", fix="Give bytes, or a number with a unit, such as 24GiB.") from error


def _split(values: dict[str, Any], taught: bool) -> tuple[Any, Any]:
    """A corpus and training options from the options of the two decorators above."""
    from headfold.export.training.options import TrainOptions
    from headfold.export.training.uptrain import Corpus

    _refuse_idle_data(values["data"], values["validation"])
    refuse_idle(
        values["holdout"] == 0 and not values["validation"],
        "evaluate_every",
        "evaluate_sequences",
        why="is of validation, and --holdout 0 leaves nothing for it",
        fix="Give --validation, or hold something out.",
    )
    refuse_idle(values["loss"] != "kl+ce", "ce_weight", why="is of the loss kl+ce", fix="Add --loss kl+ce.")
    fields = ("data", "validation", "holdout", "text_field", "cache")
    corpus = Corpus(**{name: values.pop(name) for name in fields})
    values["loss"] = values.pop("loss") or ("kl" if taught else "ce")
    if values["tensorboard"] is not None:
        _need_tensorboard()
    return corpus, TrainOptions(steps=1, **values)  # steps: see Budget


def _refuse_idle_data(data: tuple[str, ...], validation: tuple[str, ...]) -> None:
    """Of the options that say what text to train on."""
    from headfold.export.data.documents import has_columns

    refuse_idle(
        bool(validation), "holdout", why="is of validating on a share of --data", fix="Leave it out, or --validation."
    )
    refuse_idle(
        not any(map(has_columns, (*data, *validation))),
        "text_field",
        why="is of data with columns, and this is plain text",
        fix="Leave it out.",
    )


def _need_tensorboard() -> None:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise InputError("tensorboard is not installed", fix="Install it: pip install tensorboard.")


@click.group()
def study() -> None:
    """Small experiments that papers report, to repeat."""


@study.command()
@click.option("--data", multiple=True, required=True, help="Text, JSONL or parquet files, directories, data sets.")
@click.option("--validation", multiple=True, help="Data to validate on. [default: the end of --data]")
@click.option(
    "--holdout", type=Range(0, 1, max_open=True), default=0.05, show_default=True, help="Share to validate on."
)
@click.option("--text-field", default="text", show_default=True, help="Column that holds the text.")
@click.option("--steps", type=int, default=1000, show_default=True, help="To train each for.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Runs of each variant.")
@click.option("--batch", type=int, default=16, show_default=True, help="Sequences per step.")
@click.option("--sequence", type=int, default=128, show_default=True, help="Bytes.")
@click.option("--learning-rate", type=NUMBER, default=3e-3, show_default=True, help="At its peak.")
@click.option("--hidden-size", type=int, default=64, show_default=True, help="Width of the model.")
@click.option(
    "--d-ff", type=int, default=384, show_default=True, help="Of plain feed-forwards; gated ones have 2/3 of it."
)
@click.option("--layers", type=int, default=2, show_default=True, help="Of the model.")
@click.option("--heads", type=int, default=4, show_default=True, help="Of each layer.")
@click.option("--variants", help="Some of them only, with commas between. [default: all eight]")
@click.option("--evaluate-sequences", type=int, default=128, show_default=True, help="To validate on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the table here, as JSON.")
@JSON
@QUIET
def glu(
    data: tuple[str, ...],
    validation: tuple[str, ...],
    holdout: float,
    text_field: str,
    steps: int,
    seeds: int,
    batch: int,
    sequence: int,
    learning_rate: float,
    hidden_size: int,
    d_ff: int,
    layers: int,
    heads: int,
    variants: str | None,
    evaluate_sequences: int,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the eight feed-forwards of Shazeer 2020 at equal parameters, as its table 1 does, on a small model of bytes.

    **Example**: `headfold study glu --data corpus.txt --steps 2000 --seeds 5 -o glu.json`
    """
    from rich.console import Console

    from headfold.export.model.config import FEED_FORWARDS
    from headfold.export.studies.glu import GluOptions, byte_tokens, render, study_glu
    from headfold.export.training.options import TrainOptions

    _refuse_idle_data(data, validation)
    if output is not None:
        check_file(output)
    names = tuple(variants.split(",")) if variants else tuple(FEED_FORWARDS)
    options = GluOptions(hidden_size, d_ff, layers, heads, seeds, names)
    training = TrainOptions(steps, batch, sequence, learning_rate, evaluate_sequences=evaluate_sequences)
    tokens = byte_tokens(data, text_field)
    train_on, validate_on = (tokens, byte_tokens(validation, text_field)) if validation else tokens.split(holdout)
    result = study_glu(train_on, validate_on, training, options, reporter_for(quiet))
    content = result.to_json()
    if output is not None:
        write_file(output, content)
    if as_json:
        print_json(content)
    else:
        render(result, Console(highlight=False))
