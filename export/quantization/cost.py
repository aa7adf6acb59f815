"""What rounded weights cost: the bundle in ONNX Runtime, decoding as `generate` does, against PyTorch with the weights as they were.

On text that nothing was fitted to. Shapes: N sequences of S tokens, V the vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headfold.export.data.calibration import together
from headfold.export.model.decoder import Decoder
from headfold.export.quantization.forced import Forced, open_forced
from headfold.export.quantization.running import Running
from headfold.runtime.errors import DataError
from headfold.runtime.manifest import Manifest, WeightsCost

_TOGETHER = 512  # tokens that go through the model at a time
_LARGEST_LOSS = np.log(np.finfo(np.float64).max)  # nats


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of the text."""

    tokens: NDArray[np.int64]  # [N, S]
    logits: NDArray[np.float32]  # [N, S, V]
    greedy: NDArray[np.int64]  # [N, S / 2]: the answers to the first halves


@torch.inference_mode()
def reference(model: Running | Decoder, tokens: Tensor) -> Reference:
    """Run a float32 model on int64 tokens [N, S], S at least 2.

    Raises:
        DataError: it computes NaN or infinity.
    """
    half = tokens.shape[1] // 2
    parts = together(tokens, _TOGETHER)
    run = model.logits(parts) if isinstance(model, Running) else (model(part).logits for part in parts)
    zeros = model.zeros if isinstance(model, Running) else torch.zeros
    logits = zeros(*tokens.shape, model.config.vocab_size)  # made once: it is large
    rows = iter(together(logits, _TOGETHER))
    for now in run:  # not by zip, which has the last ones still in its hand while the next are computed
        if not torch.stack(torch.aminmax(now)).isfinite().all():
            raise DataError(
                "the model computes NaN or infinity, so nobody can say what rounding its weights costs",
                fix="Leave out --weights, or correct the model.",
            )
        next(rows).copy_(now)
        del now
    cache = model.new_cache(len(tokens), 2 * half)
    answers, new = tokens[:, :0], tokens[:, :half]
    for step in range(half):
        mask = torch.ones(len(tokens), half + step, dtype=torch.long)
        new = model(new, mask, cache, last_only=True).logits[:, -1].argmax(-1, keepdim=True)  # [N, 1]
        answers = torch.cat((answers, new), 1)
    return Reference(tokens.numpy(), logits.numpy(), answers.numpy())


def weights_cost(bundle: Path, manifest: Manifest, before: Reference, prefill: Path | None = None) -> WeightsCost:
    """Measure a bundle, finished or staged. Where its logits are no numbers, its costs are none either.

    Where another one reads prompts, the first halves of the text are prompts, and what is decoded behind them is measured.
    """
    forced = open_forced(bundle, manifest, prefill)
    tokens, length = before.tokens, before.tokens.shape[1]
    prompt = 1 if prefill is None else length // 2
    kl, same, losses = [], [], []
    for place, logits in enumerate(forced.logits(tokens, prompt), prompt - 1):
        exact, now = _log_softmax(before.logits[:, place]), _log_softmax(logits)
        kl.append((np.exp(exact) * (exact - now)).sum(1))  # [N]
        same.append(exact.argmax(1) == now.argmax(1))
        if place + 1 < length:
            following = tokens[:, place + 1, None]
            losses.append([-np.take_along_axis(x, following, 1).mean() for x in (exact, now)])
    # Of a loss that float64 has no exponential of it is the largest that it has: JSON has no infinity
    perplexity_before, perplexity = np.exp(np.minimum(np.mean(losses, 0), _LARGEST_LOSS))
    return WeightsCost(
        tokens=tokens[:, prompt - 1 :].size,
        kl=float(np.mean(kl)),
        kl_99=float(np.percentile(kl, 99)),
        top1=float(np.mean(same)),
        perplexity_before=float(perplexity_before),
        perplexity=float(perplexity),
        greedy_tokens=before.greedy.shape[1],
        greedy_agreement=_greedy_agreement(forced, before),
    )


def _greedy_agreement(forced: Forced, before: Reference) -> float:
    """How many tokens of an answer come before the first that differs, a mean over the answers.

    Up to there the bundle would have been given its own answer, which is the same.
    """
    half = before.greedy.shape[1]
    given = np.concatenate([before.tokens[:, :half], before.greedy[:, :-1]], 1)  # [N, S - 1]
    answers = np.stack([logits.argmax(1) for logits in forced.logits(given, half)], 1)  # [N, steps]
    return float(np.cumprod(answers == before.greedy, 1).sum(1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
