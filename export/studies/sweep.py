"""The trade-off made visible: convert a checkpoint to several numbers of key/value heads, uptrain each, measure size and speed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from headfold.export.bundle.inspection import inspect_path
from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.opening import load_decoder, open_own
from headfold.export.conversion.heads import Init
from headfold.export.exportables.own import OwnModel
from headfold.export.model.config import ModelConfig
from headfold.export.progress import Reporter
from headfold.export.publishing import scratch
from headfold.export.publishing import sweep as sweep_leftovers
from headfold.export.studies.sweep_results import Choice, Point, SweepReport, choose
from headfold.export.studies.sweep_runs import Runs, Student
from headfold.export.studies.timing import Timing, machine, time_decoding
from headfold.export.training.options import TrainOptions
from headfold.export.training.uptrain import Budget, Corpus
from headfold.plugins.dtypes import DTYPES, DType
from headfold.runtime.errors import CheckpointError, ConfigError, DataError, InputError


@dataclass(frozen=True)
class SweepOptions:
    """What to measure. `memory` is in bytes, contexts are in tokens."""

    kv_heads: tuple[int, ...]
    init: Init = "svd"
    contexts: tuple[int, ...] = ()  # to decode at; default: see `default_contexts`
    memory: int = 8 << 30
    dtype: DType = "float32"  # of weights and cache, when they are timed and counted
    control: bool = True  # also train the original on
    baseline: bool = False  # also mean pooling and cross-entropy at alpha 0.05
    budget_kv_bytes: int | None = None
    max_loss: float | None = None
    rounds: int = 5
    decode_tokens: int = 16  # timed together, at each context
    threads: int | None = None  # of onnxruntime; default: physical cores


def sweep(
    source: Path,
    output: Path,
    corpus: Corpus,
    training: TrainOptions,
    budget: Budget,
    options: SweepOptions,
    reporter: Reporter,
    resume: bool = False,
) -> SweepReport:
    """Sweep the checkpoint at `source`; uptrained checkpoints are written to `output/kv-N`, and training runs to `output/runs`.

    Args:
        source: a checkpoint; its own number of heads is always one of the points.
        output: directory to make; with `resume` it may be there, and runs that were finished in it are not repeated.
        corpus: to train and validate on; it must leave something to validate on.
        training: of every run; its loss is the students'.
        budget: of every run.
        options: what to measure.
        reporter: told what goes on.
        resume: see `output`.

    Raises:
        HeadfoldError: bad options, see `train`, `tokenize` and `export_bundle`.
    """
    if output.exists() and not resume:
        raise CheckpointError("already exists", where=output, fix="Choose another place, or go on there with --resume.")
    checkpoint = open_own(source)
    config = checkpoint.config
    counts, timing = _counts(options.kv_heads, config), _timing(options, config)
    if counts == [config.num_key_value_heads] and not options.control:
        raise InputError(
            f"its own {counts[0]} key/value heads are nothing to sweep",
            where="--kv-heads",
            fix="Give smaller numbers, too; or leave out --no-control, to train the original on.",
        )
    if options.baseline and budget.pretrain_tokens is None:
        raise InputError("the baseline's length is not known", fix="Give --pretrain-tokens: it trains on 5 % of them.")
    training = replace(training, steps=budget.steps(training))
    training = replace(training, evaluate_every=training.evaluate_every or max(training.steps // 8, 1))
    data, validation = corpus.load(checkpoint, training, reporter)
    if validation is None:
        raise DataError("there is nothing to validate on", fix="Give --validation, or a larger --holdout.")
    output.mkdir(exist_ok=True)
    sweep_leftovers(output)
    runs = Runs(checkpoint, output, data, validation, training, reporter)
    students = _students(runs, counts, options, budget)
    control = runs.train("control", checkpoint, replace(training, loss="ce"), None) if options.control else []
    times = _times(students, output / "bundles", options.dtype, timing, reporter)
    points = [_point(student, times[student.kv_heads], options) for student in students]
    settings = asdict(training) | asdict(options) | {"contexts": list(timing.contexts), "data": list(corpus.data)}
    settings |= {"tokens": training.steps * training.batch * training.sequence, "alpha": budget.alpha}
    settings |= {"pretrain_tokens": budget.pretrain_tokens, "training_tokens_available": len(data)}
    return SweepReport(
        source=source.name,
        model=inspect_path(source),
        settings={name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        machine=machine(options.threads),
        original=config.num_key_value_heads,
        control_curve=control,
        points=points,
        choice=choose(points, options.budget_kv_bytes, options.max_loss),
    )


def _students(runs: Runs, counts: Sequence[int], options: SweepOptions, budget: Budget) -> list[Student]:
    own = runs.checkpoint.config.num_key_value_heads
    teacher = load_decoder(runs.checkpoint, torch.float32, runs.options.sequence)
    full = load_decoder(runs.checkpoint) if len(counts) > 1 else teacher  # calibration may be longer than training
    paper = budget if options.baseline else None
    return [
        runs.original(teacher) if count == own else runs.student(full, teacher, count, options.init, paper)
        for count in counts
    ]


def _point(student: Student, seconds: dict[int, float], options: SweepOptions) -> Point:
    config, itemsize = student.checkpoint.config, DTYPES[options.dtype].size
    weights = sum(math.prod(shape) for shape in student.checkpoint.shapes().values()) * itemsize
    kv = 2 * config.num_hidden_layers * student.kv_heads * config.head_dim * itemsize  # keys and values
    room = max(options.memory - weights, 0) // kv
    return Point(
        kv_heads=student.kv_heads,
        converted_loss=student.before,
        loss=student.loss,
        curve=student.curve,
        layer_errors=student.layer_errors,
        kv_bytes_per_token=kv,
        weight_bytes=weights,
        cache_tokens=room,
        largest_batch={context: room // context for context in seconds},
        seconds_per_token=seconds,
        baseline_curve=student.baseline,
    )


def _times(
    students: Sequence[Student], folder: Path, dtype: DType, timing: Timing, reporter: Reporter
) -> dict[int, dict[int, float]]:
    """Seconds per token by count and context, of bundles that are gone afterwards; the weights' values make no difference."""
    with scratch(folder) as directory:
        bundles = {}
        for student in students:
            bundle = directory / str(student.kv_heads)
            options = ExportOptions(dtype=dtype, capacity=max(timing.contexts) + timing.decode_tokens, verify=False)
            export_bundle(OwnModel(student.checkpoint), bundle, options, Reporter(quiet=True))
            reporter.note(f"exported {student.kv_heads} key/value heads to time them")
            bundles[student.kv_heads] = bundle
        with reporter.step("time decoding"):
            return time_decoding(bundles, timing)


def _counts(asked: Sequence[int], config: ModelConfig) -> list[int]:
    own = config.num_key_value_heads
    for count in asked:
        if count < 1 or own % count:
            divisors = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
            raise ConfigError(
                f"{count} key/value heads cannot be made of {own}", fix=f"Choose among its divisors: {divisors}."
            )
    return sorted({*asked, own})


def default_contexts(positions: int, new: int) -> tuple[int, ...]:
    """512 and up to three quadruples of it; for models that are shorter, a quarter, a half and all of what they can."""
    longest = positions - new
    return tuple(n for n in (512, 2048, 8192) if n <= longest) or (longest // 4, longest // 2, longest)


def _timing(options: SweepOptions, config: ModelConfig) -> Timing:
    """What to time. Raises InputError: the model has not so many positions, or there is no memory."""
    contexts = options.contexts or default_contexts(config.max_position_embeddings, options.decode_tokens)
    for context in contexts:
        if context < 1 or context + options.decode_tokens > config.max_position_embeddings:
            raise InputError(
                f"a context of {context} and {options.decode_tokens} tokens to time are not within the model's "
                f"{config.max_position_embeddings} positions",
                fix="Choose others with --contexts.",
            )
    if options.memory < 1:
        raise InputError(f"memory is {options.memory} bytes", fix="It must be 1 or more.")
    return Timing(contexts, options.rounds, options.decode_tokens, options.threads)


def unpicked(choice: Choice, options: SweepOptions) -> bool:
    """Whether a choice was asked for and could not be made."""
    return choice.kv_heads is None and (options.budget_kv_bytes is not None or options.max_loss is not None)
