"""Uptraining: a converted student learns for a small share of its pretraining, from text and from the model it was made of.

Ainslie et al. 2023, section 2.2, with their loss (`ce`) or a teacher's distributions (`kl`). The result is a Hugging Face directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from headfold.export.checkpoints.base import Checkpoint, MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_own, trainable
from headfold.export.data.token_data import TokenData, tokenize
from headfold.export.progress import Reporter
from headfold.export.publishing import check_free
from headfold.export.training.loop import accelerator, train
from headfold.export.training.options import TrainOptions, TrainResult
from headfold.export.training.state import latest, writing
from headfold.runtime.errors import CheckpointError, DataError, InputError, TokenizerMismatchError

RUN_SUFFIX = ".training"  # of the directory of checkpoints and log, beside the output


@dataclass(frozen=True)
class Budget:
    """How long to uptrain: `tokens`, or `alpha` times the tokens of the pretraining (Ainslie et al. 2023, section 2.2)."""

    tokens: int | None = None
    alpha: float | None = None
    pretrain_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.alpha is None):
            raise InputError(
                "how long to uptrain is not clear", fix="Give either --tokens, or --alpha and --pretrain-tokens."
            )
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}", fix="It must be 1 or more.")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise InputError(
                f"alpha is {self.alpha:g}",
                fix="It is a share of the pretraining, over 0 and at most 1; the paper's is 0.05.",
            )
        if (self.alpha is None) != (self.pretrain_tokens is None) or (self.pretrain_tokens or 1) < 1:
            raise InputError(
                f"alpha is {self.alpha} and pretrain_tokens {self.pretrain_tokens}",
                fix="The tokens to train are alpha x the tokens the model was pretrained on: give both, with --pretrain-tokens.",
            )

    def steps(self, options: TrainOptions) -> int:
        """Optimizer steps that process at least the tokens; each takes batch x sequence."""
        tokens = self.tokens or round((self.alpha or 0.0) * (self.pretrain_tokens or 0))
        return max(-(-tokens // (options.batch * options.sequence)), 1)


@dataclass(frozen=True)
class Corpus:
    """Where text comes from; see `headfold.export.data.documents.pieces`. Without `validation` the end of the data is held out."""

    data: tuple[str, ...]
    validation: tuple[str, ...] = ()
    holdout: float = 0.01
    text_field: str = "text"
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout is {self.holdout:g}", fix="It is a share of the data: 0 or more, less than 1.")

    def load(
        self, checkpoint: Checkpoint, options: TrainOptions, reporter: Reporter
    ) -> tuple[TokenData, TokenData | None]:
        """Training and validation tokens; no validation if too little is held out for one sequence and the share is the default."""

        def read(sources: Sequence[str]) -> TokenData:
            return tokenize(
                sources, checkpoint.tokenizer.definition, checkpoint.config, reporter, self.text_field, self.cache
            )

        if self.validation:
            return read(self.validation_free()), read(self.validation)
        data = read(self.data)
        held = int(len(data) * self.holdout)
        if held < options.sequence + 1:
            reporter.note(f"no validation: {held} held-out tokens are less than a sequence of {options.sequence}")
            return data, None
        return data.split(self.holdout)

    def validation_free(self) -> tuple[str, ...]:
        """The training sources.

        Raises:
            DataError: one of them is also there to validate on.
        """
        both = set(self.data) & set(self.validation)
        if both:
            raise DataError("is there to train and to validate on", where=min(both), fix="Name other validation data.")
        return self.data


def uptrain(
    student: Path,
    output: Path,
    corpus: Corpus,
    options: TrainOptions,
    budget: Budget,
    reporter: Reporter,
    teacher: Path | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
) -> TrainResult:
    """Uptrain the checkpoint `student` and write the Hugging Face directory `output`; checkpoints go to `<output>.training`.

    Args:
        student: a checkpoint, of `headfold convert` or any other.
        output: must not exist; written complete or not at all.
        corpus: what to train and validate on, tokenized with the student's tokenizer.
        options: how; `steps` is replaced by what the budget gives.
        budget: how long.
        reporter: told what goes on.
        teacher: a checkpoint with the student's vocabulary; its parameters are not trained.
        dtype: of the written weights. [default: the student's]
        resume: go on from the newest checkpoint; a run that was not begun begins.

    Raises:
        TokenizerMismatchError: teacher and student have different vocabularies.
        HeadfoldError: see `train`, `tokenize` and `open_own`.
    """
    check_free(output, CheckpointError)
    if options.loss != "ce" and teacher is None:
        raise InputError(f"the loss {options.loss} needs a teacher", fix="Name one with --teacher, or use --loss ce.")
    options = replace(options, steps=budget.steps(options))
    source = open_own(student)
    taught_by = open_own(teacher) if teacher is not None and options.loss != "ce" else None
    for checkpoint in filter(None, (source, taught_by)):
        if options.sequence > checkpoint.config.max_position_embeddings:
            raise InputError(
                f"a sequence of {options.sequence} tokens is over its {checkpoint.config.max_position_embeddings} positions",
                where=checkpoint.path,
                fix="Choose a shorter --sequence.",
            )
    if taught_by is not None:
        check_vocabulary(source, taught_by)
    process = accelerator(options)
    quiet = reporter if process.is_main_process else Reporter(quiet=True)
    with process.local_main_process_first():  # the others find the tokens in the cache
        data, validation = corpus.load(source, options, quiet)
    tokens = options.steps * options.batch * options.sequence
    count = process.num_processes
    where = f"{count} processes, {process.device.type}" if count > 1 else f"one process, {process.device.type}"
    quiet.note(
        f"{options.steps:,} steps of {options.batch} x {options.sequence}: {tokens:,} tokens of {len(data):,} there are; {where}"
    )
    if resume and latest(run_directory(output)) is None:
        quiet.note("no checkpoint to resume from: start at step 0")
    result = train(
        trainable(source, options.sequence),
        data,
        options,
        validation=validation,
        teacher=load_decoder(taught_by, torch.float32, options.sequence) if taught_by is not None else None,
        directory=run_directory(output),
        resume=resume,
        tokenizer=source.tokenizer,
        reporter=quiet,
    )
    if process.is_main_process:
        stored = dtype or source.dtype(next(iter(source)))
        tensors = result.decoder.state_dict()
        with writing(output.name, run_directory(output)):
            save_hf(output, MemoryCheckpoint(output, source.config, tensors, source.tokenizer), stored)
    process.wait_for_everyone()
    return result


def run_directory(output: Path) -> Path:
    """Where the checkpoints and the log of a run lie."""
    return output.with_name(output.name + RUN_SUFFIX)


def check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Make sure that a token id means the same to both.

    Raises:
        TokenizerMismatchError: the vocabularies' sizes differ, or their tokenizers give an id to different tokens.
    """
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    fix = "Take the teacher that the student was converted from, or train with --loss ce."
    if ours != theirs:
        raise TokenizerMismatchError(
            f"has {theirs} tokens in its vocabulary, and the student {student.path} has {ours}",
            where=teacher.path,
            fix=fix,
        )
    first, second = (c.tokenizer.definition for c in (student, teacher))
    if first is None or second is None or first == second:
        return
    mine, other = _by_id(first, student.path), _by_id(second, teacher.path)
    for token in sorted(mine.keys() | other.keys()):
        if mine.get(token) != other.get(token):
            raise TokenizerMismatchError(
                f"its tokenizer gives id {token} to {other.get(token)!r}, that of the student {student.path} "
                f"to {mine.get(token)!r}",
                where=teacher.path,
                fix=fix,
            )


def _by_id(definition: bytes, where: Path) -> dict[int, str]:
    try:
        vocabulary: dict[str, int] = Tokenizer.from_buffer(definition).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise CheckpointError(
            f"its tokenizer.json is damaged: {error}", where=where, fix="Download it again."
        ) from error
    return {token: text for text, token in vocabulary.items()}
