"""Prompts of any kind become token ids: text, ids, messages, or a list of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headfold.runtime.errors import InputError
from headfold.runtime.scheduling.request import Ids
from headfold.runtime.text import Text, Tools

_NO_PROMPT = "Give text, token ids, messages, or a list of them."


class Prompts:
    """Reads prompts for a model of `vocab_size` tokens. Everything here raises InputError for what is no prompt."""

    def __init__(self, text: Text, vocab_size: int) -> None:
        self._text, self._vocab_size = text, vocab_size

    def read(self, prompt: Any, tools: Tools, variables: Mapping[str, Any] | None) -> tuple[list[Ids], bool]:
        """Token ids of each prompt, and whether there was only one, not in a list."""
        if _is_one(prompt):
            return [self.encode(prompt, tools, variables)], True
        if not isinstance(prompt, Sequence | np.ndarray) or (isinstance(prompt, np.ndarray) and prompt.ndim == 0):
            raise InputError(f"a prompt cannot be a {type(prompt).__name__}", fix=_NO_PROMPT)
        if not len(prompt):
            raise InputError("the prompt is empty", fix=_NO_PROMPT)
        return [self.encode(one, tools, variables) for one in prompt], False

    def encode(self, prompt: Any, tools: Tools = None, variables: Mapping[str, Any] | None = None) -> Ids:
        """Token ids [S] of one prompt."""
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and any(isinstance(x, Mapping) for x in prompt):
            return self.checked(self._text.encode_chat(prompt, tools, variables))
        if tools is not None or variables is not None:
            raise InputError("tools and template_variables are for messages", fix="Give messages, or leave them out.")
        return self.checked(self._text.encode(prompt) if isinstance(prompt, str) else prompt)

    def checked(self, ids: ArrayLike) -> Ids:
        """Token ids [S] of one sequence, S >= 1, all in the vocabulary."""
        array = integers(ids)
        if array.ndim != 1:
            raise InputError("a prompt is neither text nor token ids nor messages", fix=_NO_PROMPT)
        if array.min() < 0 or array.max() >= self._vocab_size:
            bad = int(array.min()) if array.min() < 0 else int(array.max())
            raise InputError(f"token {bad} is not in the vocabulary", fix=f"Token ids are 0 to {self._vocab_size - 1}.")
        return array.astype(np.int64)


def _is_one(prompt: Any) -> bool:
    """Whether it is one prompt, not a list of them."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    first = prompt[0] if isinstance(prompt, Sequence) and len(prompt) else None
    return isinstance(prompt, str) or isinstance(first, int | np.integer | Mapping)


def integers(ids: ArrayLike) -> NDArray[np.integer[Any]]:
    """An array of at least one integer."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # rows of different lengths
        raise InputError("the rows of token ids differ in length", fix="Give them one by one.") from error
    if array.size == 0:
        raise InputError("the prompt is empty", fix="Give at least one token.")
    if array.dtype.kind not in "iu":
        raise InputError("token ids are not integers", fix=_NO_PROMPT)
    return array
