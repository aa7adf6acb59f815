"""How exact float32 can be on a model, asked where a graph is out of tolerance: no graph is held to more than that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headfold.export.exportables.oracle import Answer, Oracle, nudge
from headfold.runtime.weight_pages import give_back_freed

Answers = Sequence[Answer]
_NUDGES = 2


@dataclass(frozen=True)
class Doubt:
    """The same answers as they may as well be, and as they are: the difference is what the narrower dtype loses."""

    others: Sequence[Answers]
    right: Answers


@dataclass(frozen=True)
class Doubts:
    """Of a model whole, of each layer alone (a `Doubt` for each place), and of PyTorch in float16 if that was asked for."""

    whole: Doubt
    alone: Sequence[Doubt]
    narrow: Doubt | None


def find_doubts(
    reference: Callable[[torch.dtype], Oracle],
    rows: Callable[[Oracle], Answers],
    places: Callable[[Oracle], Sequence[Answers]],
    float16: bool,
) -> Doubts:
    """What the reference says in float32, in float64, and in float64 with weights that float32 can hardly tell from its own.

    A sum of products that is off by rounding is the exact sum of slightly other weights (Higham 2002, Accuracy and Stability of
    Numerical Algorithms, section 3.1); float32 alone may be lucky in the one order of sums that PyTorch has.

    Args:
        reference: the model in a dtype.
        rows: asks it the rows.
        places: asks it each place, each layer fed with what the oracle's handed on.
        float16: whether float16 is asked, too.
    """
    narrow = reference(torch.float32)
    rows_told, places_told = [rows(narrow)], [places(narrow)]
    del narrow  # one at a time: in float64 a model is large enough
    give_back_freed()
    wide = reference(torch.float64)
    right_rows, right_places = rows(wide), places(wide)
    for seed in range(_NUDGES):
        nudge(wide.module, seed)
        give_back_freed()
        rows_told.append(rows(wide))
        places_told.append(places(wide))
    del wide
    give_back_freed()
    alone = [Doubt(told, right) for right, *told in zip(right_places, *places_told, strict=True)]
    half = Doubt([rows(reference(torch.float16))], rows_told[0]) if float16 else None
    return Doubts(Doubt(rows_told, right_rows), alone, half)
