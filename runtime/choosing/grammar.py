"""Answers of a prescribed form: a JSON schema or a Lark grammar says which tokens may come next.

llguidance computes that, within bounds of its own. `Grammars` are a bundle's; a `Form` serves one answer.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from headfold.runtime.errors import InputError

_LONGEST = 1 << 20  # characters of a schema or a grammar
_FIX = "Correct it."
# Spaces as Python's json writes them, and no others: small models add line breaks for ever. A schema's "x-guidance" has the last word.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Form:
    """The form of one answer, as far as it has come."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing more can come."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little").astype(np.bool_)
        return np.pad(found, (0, self._vocab_size - len(found)))

    def push(self, token: int) -> None:
        """A token came."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> "Form":
        """The same form for another answer."""
        return Form(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot go on: {self._matcher.get_error()}", fix="Give a simpler one.")


class Grammars:
    """Makes forms of a bundle's tokens; `ends` are those that may end an answer.

    Raises:
        InputError: llguidance is not installed, or cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise InputError(
                "llguidance, which knows grammars, is not installed", fix='Install it: pip install "headfold[grammar]".'
            ) from error
        if not ends:
            raise InputError("the bundle names no token that ends an answer", fix="Ask for no grammar.")
        self._matcher, self._vocab_size = llguidance.LLMatcher, vocab_size
        known = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        try:
            self._tokens = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=known, eos_token=sorted(ends))
        except Exception as error:  # of Rust, without a common base
            raise InputError(
                f"grammars cannot use the bundle's tokenizer: {error}", fix="Ask for no grammar."
            ) from error

    def form(self, json_schema: Mapping[str, Any] | None, grammar: str | None) -> Form:
        """Of one of the two. Raises InputError: both are given, or llguidance does not understand it."""
        if json_schema is not None and grammar is not None:
            raise InputError("both json_schema and grammar are given", fix="Give one of them.")
        if json_schema is not None:
            name, source = "json_schema", _as_json(json_schema)
        else:
            name, source = "grammar", _as_text(grammar)
        if len(source) > _LONGEST:
            raise InputError(f"{name} has over {_LONGEST:,} characters", fix="Give a shorter one.")
        try:
            compiled = (
                self._matcher.grammar_from_json_schema(source, defaults=_JSON)
                if json_schema is not None
                else self._matcher.grammar_from_lark(source)
            )
        except ValueError as error:  # too deep
            raise InputError(f"{name} cannot be followed: {error}", fix=_FIX) from error
        matcher = self._matcher(self._tokens, compiled, log_level=0)
        if matcher.is_error():
            raise InputError(f"{name} cannot be followed: {matcher.get_error()}", fix=_FIX)
        return Form(matcher, self._vocab_size)


def _as_json(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise InputError(f"json_schema is a {type(schema).__name__}", fix='Give a mapping, as {"type": "object"}.')
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"json_schema is no JSON: {error}", fix=_FIX) from error


def _as_text(grammar: Any) -> str:
    if not isinstance(grammar, str):
        raise InputError(f"grammar is a {type(grammar).__name__}", fix='Give Lark\'s text, as "start: /[0-9]+/".')
    return grammar
