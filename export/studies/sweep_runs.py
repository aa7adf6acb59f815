"""The training runs of a sweep: convert, uptrain, publish; the control; and the paper's recipe to compare with."""

from dataclasses import dataclass, replace
from pathlib import Path

from headfold.export.checkpoints.base import Checkpoint, MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import trainable
from headfold.export.conversion.checkpoint import convert_checkpoint
from headfold.export.conversion.heads import Init
from headfold.export.conversion.layers import ConvertOptions
from headfold.export.data.calibration import LENGTH, TOKENS
from headfold.export.data.token_data import TokenData
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter
from headfold.export.studies.sweep_results import Curve
from headfold.export.training.evaluation import evaluate
from headfold.export.training.loop import train
from headfold.export.training.options import TrainOptions
from headfold.export.training.uptrain import Budget

PAPER_ALPHA = 0.05  # Ainslie et al. 2023, section 3.1


@dataclass(frozen=True)
class Student:
    """One number of key/value heads: its checkpoint as it was before any training, which is as fast as after it, and its losses."""

    kv_heads: int
    checkpoint: Checkpoint
    before: float  # validation loss before any training
    curve: Curve
    layer_errors: list[float]
    baseline: Curve

    @property
    def loss(self) -> float:
        """After uptraining."""
        return self.curve[-1][1] if self.curve else self.before


@dataclass
class Runs:
    """Makes and trains the students of a sweep, below its output directory; finished runs are not repeated."""

    checkpoint: Checkpoint
    output: Path
    data: TokenData
    validation: TokenData
    options: TrainOptions
    reporter: Reporter

    def original(self, decoder: Decoder) -> Student:
        """The checkpoint as it came; `decoder` is it."""
        count, layers = self.checkpoint.config.num_key_value_heads, self.checkpoint.config.num_hidden_layers
        loss = evaluate(decoder, self.validation, self.options.sequence, self.options.evaluate_sequences)
        return Student(count, self.checkpoint, loss, [], [0.0] * layers, [])

    def student(self, decoder: Decoder, teacher: Decoder, count: int, init: Init, budget: Budget | None) -> Student:
        """The checkpoint with fewer heads, uptrained from `teacher` and published; with a budget the paper's recipe, too.

        `decoder` and `teacher` are the checkpoint, the second no longer than a training sequence.
        """
        converted, errors = self.convert(decoder, count, init)
        curve = self.train(f"kv-{count}", converted, self.options, teacher, publish=True)
        baseline = self.baseline(count, decoder, budget) if budget is not None else []
        return Student(count, converted, curve[0][1], curve, errors, baseline)

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
