"""One vector for a text: what the model makes of its tokens, pooled."""

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.errors import BundleError, InputError

Pooling = Literal["mean", "last"]  # of all tokens, or that of the last one, which alone has seen all others


def check_pooling(pooling: str) -> None:
    """Raise InputError if there is no such pooling."""
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling is {pooling!r}", fix=f"It must be {' or '.join(get_args(Pooling))}.")


def pooled(parts: Iterable[NDArray[np.float32]], pooling: Pooling, normalize: bool) -> NDArray[np.float32]:
    """Of hidden states [S, hidden], part by part, one vector [hidden]; of the length 1 if it is to be.

    Raises:
        BundleError: the model computes NaN or infinity.
    """
    total, count, last = np.zeros((), np.float64), 0, np.zeros((), np.float64)
    for states in parts:
        total, count, last = total + states.sum(0, dtype=np.float64), count + len(states), states[-1].astype(np.float64)
    vector = total / count if pooling == "mean" else last
    if not np.isfinite(vector).all():
        raise BundleError(
            f"the hidden states of its {count} tokens are NaN or infinite",
            fix="Its weights hold such numbers, or its dtype is too narrow: export with --dtype float32.",
        )
    length = float(np.linalg.norm(vector))
    if normalize and length:
        vector = vector / length
    return vector.astype(np.float32)
