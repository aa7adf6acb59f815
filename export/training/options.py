"""What a training run is told, and what it returns."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from headfold.export.model.decoder import Decoder
from headfold.export.training.losses import Loss
from headfold.runtime.errors import InputError


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Batches are in sequences, lengths in tokens, losses in nats per token."""

    steps: int
    batch: int = 8  # per step, over all processes
    sequence: int = 256
    learning_rate: float = 1e-3  # at its peak
    final_learning_rate: float = 0.1  # as a share of the peak, where the cosine ends
    warmup: float = 0.05  # share of the steps
    loss: Loss = "ce"
    ce_weight: float = 0.5  # of kl+ce
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the order of the data
    micro_batch: int | None = None  # sequences of one forward pass on one process; the others are accumulated
    bf16: bool = False  # autocast; weights and optimizer stay float32
    activation_checkpointing: bool = False
    evaluate_every: int = 0  # 0: before the first and after the last step
    evaluate_sequences: int = 64
    checkpoint_every: int = 0  # 0: after the last step
    keep: int = 2
    max_spike: float = 2.0  # a loss so far over the median of the 64 before it ends the run
    cpu: bool = False  # even if there is a GPU
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sequence", "keep", "evaluate_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", fix="It must be 1 or more.")
        for name in ("learning_rate", "clip", "max_spike"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)}", fix="It must be positive and finite.")
        for name in ("warmup", "final_learning_rate", "ce_weight", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}", fix="It must lie between 0 and 1.")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warmup, then a half cosine (Loshchilov and Hutter 2017, equation 5, one cycle)."""
        warm = max(round(self.warmup * self.steps), 1)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(self.steps - warm, 1)
        share = self.final_learning_rate + (1 - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy on the validation data after `step` steps, in nats per token."""

    step: int
    tokens: int
    loss: float


@dataclass
class TrainResult:
    """A finished run; `losses` are those of the steps this process ran."""

    decoder: Decoder
    tokens: int
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
