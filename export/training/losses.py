"""What training minimizes, per token and in nats: cross-entropy with the text, divergence from a teacher, or both."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Literal["ce", "kl", "kl+ce"]
_CHUNK = 1 << 26  # logits whose float32 log-probabilities are in memory at a time


def objective(
    loss: Loss, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, ce_weight: float = 0.5
) -> Tensor:
    """The mean over all tokens, a scalar in nats, computed in float32.

    `ce` is the negative log-likelihood of the labels. `kl` is the sum over the vocabulary of p (log p - log q) for the teacher's
    next-token distribution p and the student's q: word-level distillation (Kim and Rush 2016, section 3.1), which is Hinton et al.
    2015, section 2, at temperature 1; theirs differs by the teacher's entropy, which has no gradient. `kl+ce` weighs the two, as
    Hinton et al. do: (1 - ce_weight) kl + ce_weight ce.

    Args:
        loss: which.
        logits: [B, S, V] of the student.
        labels: int64 [B, S], the next tokens.
        teacher_logits: [B, S, V], for the losses with a teacher.
        ce_weight: share of the cross-entropy in `kl+ce`, 0 to 1.
    """
    rows = max(_CHUNK // logits.shape[-1], 1)
    students, targets = torch.split(logits.flatten(0, 1), rows), torch.split(labels.flatten(), rows)
    teachers = (
        torch.split(teacher_logits.flatten(0, 1), rows) if teacher_logits is not None else (None,) * len(students)
    )
    total = logits.new_zeros((), dtype=torch.float32)
    for student, target, teacher in zip(students, targets, teachers, strict=True):
        if len(students) == 1:
            return _sum(loss, student, target, teacher, ce_weight) / labels.numel()
        # the log-probabilities are computed again in the backward pass rather than kept
        total = total + checkpoint(_sum, loss, student, target, teacher, ce_weight, use_reentrant=False)
    return total / labels.numel()


def _sum(loss: Loss, logits: Tensor, labels: Tensor, teacher: Tensor | None, ce_weight: float) -> Tensor:
    """Summed over tokens; logits are [N, V]."""
    log_q = F.log_softmax(logits.float(), -1)
    ce = F.nll_loss(log_q, labels, reduction="sum")
    if loss == "ce":
        return ce
    assert teacher is not None
    kl = F.kl_div(log_q, F.log_softmax(teacher.float(), -1), reduction="sum", log_target=True)
    return kl if loss == "kl" else (1 - ce_weight) * kl + ce_weight * ce
