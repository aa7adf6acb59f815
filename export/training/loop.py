"""The training loop, for fresh models and for uptraining alike, on accelerate: a CPU, a GPU, or many with `accelerate launch`.

Everything a step does follows from the options, the data and the step's number, so a run that was killed and resumed ends with
the weights of one that was not: on a CPU (with the same number of threads and processes) bit for bit.
"""

import functools
import hashlib
import math
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint as recompute

from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.data.token_data import TokenData
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter
from headfold.export.training.evaluation import cross_entropy
from headfold.export.training.losses import objective
from headfold.export.training.options import Evaluation, TrainOptions, TrainResult
from headfold.export.training.state import (
    RunState,
    StepLog,
    latest,
    load_state,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_state,
)
from headfold.runtime.errors import DataError, InputError, TrainingError

_RECENT = 64  # steps whose median loss a spike is measured from
_FREE = {
    "checkpoint_every",
    "keep",
    "evaluate_every",
    "evaluate_sequences",
    "cpu",
    "tensorboard",
}  # may change on resume
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(
    decoder: Decoder,
    data: TokenData,
    options: TrainOptions,
    *,
    validation: TokenData | None = None,
    teacher: Decoder | None = None,
    directory: Path | None = None,
    resume: bool = False,
    tokenizer: TokenizerFiles | None = None,
    reporter: Reporter | None = None,
    identity: dict[str, Any] | None = None,
) -> TrainResult:
    """Train the decoder in place, with AdamW (Loshchilov and Hutter 2019).

    Args:
        decoder: float32 parameters that require gradients; see `headfold.export.model.initialize`.
        data: what to train on.
        options: how.
        validation: what to evaluate on.
        teacher: for the losses that have one; same vocabulary.
        directory: of checkpoints and log; None writes nothing.
        resume: go on from the newest checkpoint there; from the beginning if there is none.
        tokenizer: files that go into each checkpoint.
        reporter: told what goes on.
        identity: more of what decides the run's course, checked on resume beside options, data and models.

    Raises:
        DataError: less data than one batch, or tokens outside the vocabulary.
        InputError: options that contradict each other, the machine or the run that is resumed; checkpoints without `resume`.
        TrainingError: the loss or its gradient is not finite, or spiked.
        CheckpointError: a checkpoint cannot be written or read.
    """
    return _Run(decoder, data, options, validation, teacher, directory, resume, tokenizer, reporter, identity).run()


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        decoder: Decoder,
        data: TokenData,
        options: TrainOptions,
        validation: TokenData | None,
        teacher: Decoder | None,
        directory: Path | None,
        resume: bool,
        tokenizer: TokenizerFiles | None,
        reporter: Reporter | None,
        identity: dict[str, Any] | None,
    ) -> None:
        self.decoder, self.data, self.options, self.validation = decoder, data, options, validation
        self.directory, self.tokenizer = directory, tokenizer or TokenizerFiles()
        self.accelerator = accelerator(options)
        self.main = self.accelerator.is_main_process
        self.reporter = reporter if reporter is not None and self.main else Reporter(quiet=True)
        self._check(teacher)
        self.state = RunState(self._identity(teacher, identity or {}))
        self.saved = latest(directory) if directory is not None else None
        if self.saved is not None and not resume:
            raise InputError(
                "has checkpoints of an earlier run", where=directory, fix="Go on with --resume, or delete them."
            )
        if self.saved is not None:
            with torch.no_grad():
                self.state = load_state(self.saved, self.state.identity, decoder)
            self.reporter.note(f"resume from {self.saved}")
        self._prepare(teacher)

    def _check(self, teacher: Decoder | None) -> None:
        options, world = self.options, self.accelerator.num_processes
        if options.loss != "ce" and teacher is None:
            raise InputError(
                f"the loss {options.loss} needs a teacher", fix="Name one with --teacher, or use --loss ce."
            )
        if options.batch % world:
            raise InputError(
                f"a batch of {options.batch} sequences cannot be shared by {world} processes", fix="Choose a multiple."
            )
        self.micro = options.micro_batch or options.batch // world
        if self.micro < 1 or (options.batch // world) % self.micro:
            raise InputError(
                f"micro_batch is {self.micro}",
                fix=f"It must divide the {options.batch // world} sequences of a process.",
            )
        if options.sequence > self.decoder.capacity:
            raise InputError(
                f"a sequence of {options.sequence} tokens is over the model's {self.decoder.capacity} positions",
                fix="Choose a shorter --sequence.",
            )
        if self.data.windows(options.sequence) < options.batch:
            raise DataError(
                f"{len(self.data):,} tokens are less than one batch of {options.batch} x {options.sequence} and their next ones",
                fix="Name more data, or choose a smaller --batch or --sequence.",
            )
        if self.validation is not None and not self.validation.windows(options.sequence):
            raise DataError(
                f"{len(self.validation):,} validation tokens are less than one sequence of {options.sequence}",
                fix="Name more validation data, hold out a larger share, or choose a shorter --sequence.",
            )
        if self.accelerator.mixed_precision not in {"no", "bf16"}:
            raise InputError(
                f"mixed precision {self.accelerator.mixed_precision} is not supported", fix="Use bf16, or none."
            )

    def _identity(self, teacher: Decoder | None, more: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.options).items() if name not in _FREE}
        return (
            options
            | more
            | {
                "precision": self.accelerator.mixed_precision,
                "data": self.data.fingerprint,
                "start": fingerprint(self.decoder),
                "teacher": fingerprint(teacher) if teacher is not None else None,
            }
        )

    def _prepare(self, teacher: Decoder | None) -> None:
        options, decoder = self.options, self.decoder
        if options.activation_checkpointing:
            for layer in decoder.model.layers:
                layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)
        decoder._no_split_modules = ["Layer"]  # type: ignore[assignment]  # what FSDP shards one by one
        decoder.train()
        matrices = [p for p in decoder.parameters() if p.dim() > 1]
        others = [p for p in decoder.parameters() if p.dim() <= 1]  # norms and biases do not decay
        groups = [{"params": matrices, "weight_decay": options.weight_decay}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        betas = (options.beta1, options.beta2)
        adamw = torch.optim.AdamW(groups, lr=options.rate(0), betas=betas, fused=True)  # one kernel
        self.model, self.optimizer = self.accelerator.prepare(decoder, adamw)
        self.teacher = (
            self.accelerator.prepare_model(teacher, evaluation_mode=True).eval() if teacher is not None else None
        )
        if self.saved is not None:
            restore_optimizer(self.saved, self.model, self.optimizer.optimizer)
        if options.tensorboard is not None:
            self.accelerator.init_trackers("headfold")

    def run(self) -> TrainResult:
        """All steps that are left."""
        options, state = self.options, self.state
        log = StepLog(self.directory, state.step) if self.directory is not None and self.main else None
        if log is not None:
            prune(log.path.parent, options.keep)
        losses: list[float] = []
        begin = time.perf_counter()
        per_step = options.batch * options.sequence
        try:
            if state.step == 0:
                self._evaluate(log)
            with self.reporter.training(options.steps, state.step, per_step) as show:
                while state.step < options.steps:
                    start, step = time.perf_counter(), state.step
                    loss, norm = self._step(step)
                    losses.append(loss)
                    state.step, state.recent = step + 1, [*state.recent, loss][-_RECENT:]
                    line = {
                        "step": state.step,
                        "tokens": state.step * per_step,
                        "loss": loss,
                        "gradient_norm": norm,
                        "learning_rate": options.rate(step),
                        "tokens_per_second": per_step / (time.perf_counter() - start),
                    }
                    if log is not None:
                        log.write(**line)
                    self._track(line)
                    last = state.step == options.steps
                    if last or (options.evaluate_every and state.step % options.evaluate_every == 0):
                        self._evaluate(log)
                    if last or (options.checkpoint_every and state.step % options.checkpoint_every == 0):
                        self._save()
                    show(loss)
        finally:
            if log is not None:
                log.close()
            if options.tensorboard is not None:
                self.accelerator.end_training()
        evaluations = [Evaluation(int(e["step"]), int(e["tokens"]), e["loss"]) for e in state.evaluations]
        seconds = time.perf_counter() - begin
        return TrainResult(self._finished(), state.step * per_step, losses, evaluations, seconds)

    def _step(self, step: int) -> tuple[float, float]:
        """One optimizer step: the loss before it, and the norm of the gradient before clipping."""
        options, accelerator = self.options, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        rows = self.data.batch(options.seed, step, options.batch, options.sequence, rank, world)  # [b, S + 1]
        if int(rows.max()) >= self.decoder.config.vocab_size:
            raise DataError(
                f"token {int(rows.max())} is not in the vocabulary of {self.decoder.config.vocab_size}",
                fix="Tokenize with this model's tokenizer.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        parts = torch.split(rows, self.micro)
        total = torch.zeros((), device=accelerator.device)
        for index, part in enumerate(parts):
            part = part.to(accelerator.device, non_blocking=True)
            alone = index < len(parts) - 1  # gradients are exchanged once, with the last part
            with accelerator.no_sync(self.model) if alone else nullcontext():
                loss = self._loss(part[:, :-1], part[:, 1:]) / len(parts)
                accelerator.backward(loss)
            total += loss.detach()
        mean = cast(Tensor, accelerator.reduce(total, "mean")).item()
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), options.clip))
        self._stop_if_diverged(step, mean, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, norm

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        options, teacher_logits = self.options, None
        if self.teacher is not None and options.loss != "ce":
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(inputs).logits  # [b, S, V]
        with self.accelerator.autocast():
            logits = self.model(inputs).logits  # [b, S, V]
        return objective(options.loss, logits, labels, teacher_logits, options.ce_weight)

    def _stop_if_diverged(self, step: int, loss: float, norm: float) -> None:
        """Before the step is taken, so the weights in memory are never those of a step that was not finite."""
        recent = self.state.recent
        what = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"the loss is {loss:.4g} and its gradient's norm {norm:.4g}"
        elif len(recent) >= 8 and loss > statistics.median(recent) + self.options.max_spike:
            what = f"the loss of {loss:.4g} is a spike: the median before it is {statistics.median(recent):.4g}"
        if what is None:
            return
        good = latest(self.directory) if self.directory is not None else None
        kept = (
            f"The last good checkpoint is {good}; train on from it" if good else "There is no checkpoint; start again"
        )
        raise TrainingError(f"{what}", where=f"step {step + 1}", fix=f"{kept} with a lower --learning-rate.")

    def _evaluate(self, log: StepLog | None) -> None:
        if self.validation is None:
            return
        options, accelerator = self.options, self.accelerator
        rows = self.validation.spread(options.evaluate_sequences, options.sequence)
        if len(rows) >= accelerator.num_processes:
            share = len(rows) // accelerator.num_processes
            rows = rows[accelerator.process_index * share :][:share]
        self.model.eval()
        with accelerator.autocast():
            mean = cross_entropy(self.model, rows, self.micro, accelerator.device)
        self.model.train()
        loss = cast(Tensor, accelerator.reduce(mean, "mean")).item()
        tokens = self.state.step * options.batch * options.sequence
        line = {"step": self.state.step, "tokens": tokens, "loss": loss}
        self.state.evaluations.append(line)
        if log is not None:
            log.write(step=self.state.step, tokens=tokens, validation_loss=loss)
        self._track({"step": self.state.step, "validation_loss": loss})
        self.reporter.note(f"step {self.state.step}: validation loss {loss:.4f} nats per token")

    def _track(self, line: dict[str, float]) -> None:
        if self.options.tensorboard is not None:
            values = {name: value for name, value in line.items() if name != "step"}
            self.accelerator.log(values, step=int(line["step"]))

    def _save(self) -> None:
        if self.directory is None:
            return
        weights = get_model_state_dict(self.model, options=_GATHERED)
        moments = optimizer_tensors(self.model, self.optimizer.optimizer)
        if self.main:
            checkpoint = MemoryCheckpoint(
                self.directory, self.decoder.config, cast(dict[str, Tensor], weights), self.tokenizer
            )
            save_state(self.directory, checkpoint, moments, self.state, self.options.keep)
        self.accelerator.wait_for_everyone()

    def _finished(self) -> Decoder:
        """The trained decoder, whole, as it was before it was prepared."""
        if self.accelerator.distributed_type.value == "FSDP":
            weights = get_model_state_dict(self.model, options=_GATHERED)
            with torch.device("meta"):
                decoder = Decoder(self.decoder.config, self.decoder.capacity)
            decoder.load_state_dict(weights, assign=True, strict=self.main)
        else:
            decoder = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if self.options.activation_checkpointing:
                for layer in decoder.model.layers:
                    del layer.forward
        if self.teacher is not None and self.accelerator.distributed_type.value != "FSDP":
            self.accelerator.unwrap_model(self.teacher, keep_fp32_wrapper=False)  # it may teach again
        self.accelerator.free_memory()
        return decoder.eval().requires_grad_(False)


def accelerator(options: TrainOptions) -> Accelerator:
    """accelerate's handle on this process; torchrun or `accelerate launch` decides how many there are and how the model is sharded.

    Raises:
        InputError: several processes were asked for, and this one is alone.
    """
    wanted = "bf16" if options.bf16 else None
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != (wanted or "no"):
        AcceleratorState._reset_state()  # it remembers the precision of the process's first run, and refuses another
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # others wait while the first one tokenizes
    tracking = {"log_with": "tensorboard", "project_dir": options.tensorboard} if options.tensorboard else {}
    handle = Accelerator(cpu=options.cpu, mixed_precision=wanted, kwargs_handlers=[patience], **tracking)
    if handle.num_processes == 1:
        _check_alone()
    return handle


def _check_alone() -> None:
    """Whether one process is what was asked for: others that do not know of each other would all write the same files."""
    started = int(os.environ.get("WORLD_SIZE", 0))  # of torchrun
    if started > 1:
        raise InputError(
            f"{started} processes were started that do not know of each other, so each would train alone",
            fix="Start them with torchrun or accelerate launch, and with --cpu where there is no GPU.",
        )
    if not started and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():  # it sets both for several
        raise InputError(
            "`accelerate launch` was asked for several processes and started one: on CPUs it needs MPI",
            fix="Use torchrun --nproc_per_node N -m headfold.export … --cpu, or for one process no launcher.",
        )


def fingerprint(decoder: Decoder) -> str:
    """Tells models apart by their configuration and the first few values of every tensor."""
    digest = hashlib.sha256(repr(decoder.config).encode())
    for tensor in decoder.state_dict().values():
        digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
