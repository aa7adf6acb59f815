"""Linear least squares on a converted layer's output projection: it makes good what the new attention weights got wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headfold.export.conversion.statistics import second_moment
from headfold.export.conversion.streams import Streams
from headfold.export.model.decoder import Attention

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # as shares of the mean energy of the heads' outputs; `refit` chooses
_HELD_OUT = 4  # every fourth sequence, or the last fourth of each where there are fewer


@torch.inference_mode()
def refit(streams: Streams, converted: Attention) -> Tensor:
    """The output projection [hidden, H * D] in float64 that brings the converted residual stream closest to the original one.

    Least squares on what the converted heads put out where all earlier layers are converted, too. It makes good what the new attention
    weights and the earlier layers got wrong, and lets heads make good each other's errors; it changes nothing where there is
    no error. A ridge towards the present projection, chosen on a quarter of the tokens, which the choice does not fit, keeps it from
    learning the calibration tokens by heart.
    """
    projection = converted.o_proj
    fit, choice = (_Normal(projection.in_features, projection.out_features) for _ in range(2))
    sequences, length = streams.original.shape[:2]
    for number, (rows, follower) in enumerate(zip(streams.original, streams.converted, strict=True)):
        target = rows + streams.attend(streams.attention, rows[None])[0] - follower  # [S, hidden]
        with _without_projection(converted):
            features = streams.attend(converted, follower[None])[0]  # [S, H * D]
        missing = target - projection(features)
        if sequences >= _HELD_OUT:
            (choice if number % _HELD_OUT == _HELD_OUT - 1 else fit).add(features, missing)
        else:
            cut = length - length // _HELD_OUT
            fit.add(features[:cut], missing[:cut])
            choice.add(features[cut:], missing[cut:])
    scale = fit.gram.diagonal().mean()
    ridge = min(RIDGES, key=lambda share: choice.loss(fit.solution(share * scale)))
    if (
        not choice.rows or choice.loss(fit.solution(ridge * scale)) > 0
    ):  # nothing to choose on, or worse than leaving it
        return projection.weight.double()
    every = fit + choice
    return projection.weight.double() + every.solution(ridge * scale * every.rows / fit.rows).T


class _Normal:
    """The normal equations of a least-squares fit, in float64: features [N, F], and what is missing, [N, hidden]."""

    def __init__(self, features: int, outputs: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.missing = torch.zeros(features, outputs, dtype=torch.float64)
        self.rows = 0

    def add(self, features: Tensor, missing: Tensor) -> None:
        self.gram += second_moment(features)
        self.missing += (features.T @ missing).double()
        self.rows += len(features)

    def __add__(self, other: "_Normal") -> "_Normal":
        result = _Normal(*self.missing.shape)
        result.gram, result.missing = self.gram + other.gram, self.missing + other.missing
        result.rows = self.rows + other.rows
        return result

    def solution(self, ridge: Tensor) -> Tensor:
        """[F, hidden]."""
        solution: Tensor = torch.linalg.solve(
            self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64), self.missing
        )
        return solution

    def loss(self, solution: Tensor) -> float:
        """The squared error of a solution, less that of zero."""
        return (((self.gram @ solution - 2 * self.missing) * solution).sum()).item()


@contextmanager
def _without_projection(attention: Attention) -> Iterator[None]:
    projection, attention.o_proj = attention.o_proj, nn.Identity()  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.o_proj = projection
