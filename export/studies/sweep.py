"""The trade-off made visible: convert a checkpoint to several numbers of key/value heads, uptrain each, measure size and speed."""

import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from headfold.export.bundle.inspection import inspect_path
from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import Checkpoint, MemoryCheckpoint
from headfold.export.checkpoints.hf import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint, trainable
from headfold.export.conversion.checkpoint import convert_checkpoint
from headfold.export.conversion.heads import Init
from headfold.export.conversion.layers import ConvertOptions
from headfold.export.data.calibration import LENGTH, TOKENS
from headfold.export.data.token_data import TokenData
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter
from headfold.export.studies.sweep_results import Choice, Curve, Point, SweepReport, choose
from headfold.export.training.evaluation import evaluate
from headfold.export.training.loop import train
from headfold.export.training.options import TrainOptions
from headfold.export.training.uptrain import Budget, Corpus
from headfold.plugins.dtypes import DType
from headfold.runtime import load
from headfold.runtime.cpu import physical_cores
from headfold.runtime.errors import CheckpointError, ConfigError, DataError, InputError

PAPER_ALPHA = 0.05  # Ainslie et al. 2023, section 3.1


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
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    counts = _counts(options.kv_heads, config)
    contexts = options.contexts or default_contexts(config.max_position_embeddings, options.decode_tokens)
    _check_contexts(contexts, config, options)
    if options.baseline and budget.pretrain_tokens is None:
        raise InputError("the baseline's length is not known", fix="Give --pretrain-tokens: it trains on 5 % of them.")
    training = replace(training, steps=budget.steps(training))
    training = replace(training, evaluate_every=training.evaluate_every or max(training.steps // 8, 1))
    data, validation = corpus.load(checkpoint, training, reporter)
    if validation is None:
        raise DataError("there is nothing to validate on", fix="Give --validation, or a larger --holdout.")
    output.mkdir(exist_ok=True)
    runs = _Runs(checkpoint, output, data, validation, training, reporter)
    original = load_decoder(checkpoint, torch.float32, training.sequence)
    full = load_decoder(checkpoint) if len(counts) > 1 else original
    points, bundles = [], {}
    for count in counts:
        if count == config.num_key_value_heads:
            loss = evaluate(original, validation, training.sequence, training.evaluate_sequences)
            student, errors, curve, before = checkpoint, [0.0] * config.num_hidden_layers, [], loss
            baseline: Curve = []
        else:
            student, errors = runs.convert(full, count, options.init)
            curve = runs.train(f"kv-{count}", student, training, original, publish=True)
            before, loss = curve[0][1], curve[-1][1]
            baseline = runs.baseline(count, full, budget) if options.baseline else []
        bundles[count] = _bundle(student, output, count, contexts, options, reporter)
        points.append(_point(student, options, contexts, count, before, loss, curve, errors, baseline))
    control = runs.train("control", checkpoint, replace(training, loss="ce"), None) if options.control else []
    with reporter.step("time decoding"):
        times = time_decoding(bundles, contexts, options)
    shutil.rmtree(output / "bundles", ignore_errors=True)
    points = [replace(point, seconds_per_token=times[point.kv_heads]) for point in points]
    settings = asdict(training) | asdict(options) | {"contexts": list(contexts), "data": list(corpus.data)}
    settings |= {"tokens": training.steps * training.batch * training.sequence, "alpha": budget.alpha}
    settings |= {"pretrain_tokens": budget.pretrain_tokens, "training_tokens_available": len(data)}
    choice = choose(points, options.budget_kv_bytes, options.max_loss)
    return SweepReport(
        source.name,
        inspect_path(source),
        {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        machine(options.threads),
        config.num_key_value_heads,
        control,
        points,
        choice,
    )


@dataclass
class _Runs:
    """The training runs of a sweep."""

    checkpoint: Checkpoint
    output: Path
    data: TokenData
    validation: TokenData
    options: TrainOptions
    reporter: Reporter

    def convert(self, decoder: Decoder, count: int, init: Init) -> tuple[Checkpoint, list[float]]:
        """The checkpoint with so many key/value heads, calibrated on training data, and each layer's error."""
        length = min(LENGTH, self.options.sequence)
        tokens = self.data.spread(max(TOKENS // length, 1), length)[:, :-1]
        options = ConvertOptions(count, init, seed=self.options.seed)
        conversion = convert_checkpoint(self.checkpoint, options, tokens, self.reporter, decoder)
        return conversion.checkpoint, list(conversion.errors)

    def train(
        self, name: str, student: Checkpoint, options: TrainOptions, teacher: Decoder | None, publish: bool = False
    ) -> Curve:
        """Validation losses of a run; a finished one is read from its last checkpoint."""
        self.reporter.note(f"train {name}")
        result = train(
            trainable(student, options.sequence),
            self.data,
            replace(options, keep=1),
            validation=self.validation,
            teacher=teacher if options.loss != "ce" else None,
            directory=self.output / "runs" / name,
            resume=True,
            tokenizer=student.tokenizer,
            reporter=self.reporter,
        )
        if publish and not (self.output / name).exists():
            tensors = result.decoder.state_dict()
            trained = MemoryCheckpoint(self.output / name, student.config, tensors, student.tokenizer)
            save_hf(self.output / name, trained, self.checkpoint.dtype(next(iter(self.checkpoint))))
        return [(evaluation.tokens, evaluation.loss) for evaluation in result.evaluations]

    def baseline(self, count: int, decoder: Decoder, budget: Budget) -> Curve:
        """The paper's recipe: mean pooling, then cross-entropy on 5 % of the pretraining's tokens."""
        student, _ = self.convert(decoder, count, "mean")
        steps = Budget(alpha=PAPER_ALPHA, pretrain_tokens=budget.pretrain_tokens).steps(self.options)
        options = replace(self.options, loss="ce", steps=steps, evaluate_every=max(steps // 8, 1))
        return self.train(f"baseline-{count}", student, options, None)


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


def _check_contexts(contexts: Sequence[int], config: ModelConfig, options: SweepOptions) -> None:
    for context in contexts:
        if context < 1 or context + options.decode_tokens > config.max_position_embeddings:
            raise InputError(
                f"a context of {context} and {options.decode_tokens} tokens to time are not within the model's "
                f"{config.max_position_embeddings} positions",
                fix="Choose others with --contexts.",
            )
    if options.memory < 1:
        raise InputError(f"memory is {options.memory} bytes", fix="It must be 1 or more.")


def _point(
    student: Checkpoint,
    options: SweepOptions,
    contexts: Sequence[int],
    count: int,
    before: float,
    loss: float,
    curve: Curve,
    errors: list[float],
    baseline: Curve,
) -> Point:
    config, itemsize = student.config, getattr(torch, options.dtype).itemsize
    weights = sum(torch.Size(shape).numel() for shape in student.shapes().values()) * itemsize
    kv = 2 * config.num_hidden_layers * count * config.head_dim * itemsize  # keys and values
    room = max(options.memory - weights, 0) // kv
    batches = {context: room // context for context in contexts}
    return Point(count, before, loss, curve, errors, kv, weights, room, batches, {}, baseline)


def _bundle(
    student: Checkpoint, output: Path, count: int, contexts: Sequence[int], options: SweepOptions, reporter: Reporter
) -> Path:
    """Exports what will be timed; the weights' values do not matter to speed."""
    folder = output / "bundles"
    shutil.rmtree(folder / str(count), ignore_errors=True)
    folder.mkdir(exist_ok=True)
    directory = folder / f"{count}.checkpoint"
    shutil.rmtree(directory, ignore_errors=True)
    save_hf(directory, student, getattr(torch, options.dtype))
    capacity = max(contexts) + options.decode_tokens
    wanted = ExportOptions(dtype=options.dtype, capacity=capacity, verify=False, force=True)
    bundle = export_bundle(directory, folder / str(count), wanted, Reporter(quiet=True)).output
    shutil.rmtree(directory)
    reporter.note(f"exported {count} key/value heads to time them")
    return bundle


def time_decoding(
    bundles: Mapping[int, Path], contexts: Sequence[int], options: SweepOptions
) -> dict[int, dict[int, float]]:
    """Seconds per token when one sequence decodes after `context` tokens, by count and context: medians of interleaved rounds.

    The cache's contents are zeros: what they are makes no difference to the time.
    """
    backends = {count: load(path, threads=options.threads).backend for count, path in bundles.items()}
    samples: dict[tuple[int, int], list[float]] = {}
    active, token = np.ones(1, np.bool_), np.zeros(1, np.int64)
    for context in contexts:
        caches = {count: backend.new_cache(1, context + options.decode_tokens) for count, backend in backends.items()}
        for number in range(options.rounds + 1):  # the first one warms up
            for count, backend in backends.items():
                cache = caches[count]
                cache.lengths[:] = context
                start = time.perf_counter()
                for _ in range(options.decode_tokens):
                    backend.decode(cache, token, active)
                if number:
                    elapsed = (time.perf_counter() - start) / options.decode_tokens
                    samples.setdefault((count, context), []).append(elapsed)
    return {count: {c: statistics.median(samples[count, c]) for c in contexts} for count in bundles}


def machine(threads: int | None) -> dict[str, object]:
    """What the times were measured on."""
    return {
        "processor": _processor(),
        "threads": threads or physical_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": "onnxruntime, CPU",
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def unpicked(choice: Choice, options: SweepOptions) -> bool:
    """Whether a choice was asked for and could not be made."""
    return choice.kv_heads is None and (options.budget_kv_bytes is not None or options.max_loss is not None)
