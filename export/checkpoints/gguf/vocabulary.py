"""A GGUF file's vocabulary, and a tokenizer of one that SentencePiece made (tokenizer.ggml.model = llama).

SentencePiece merges the neighbours whose piece scores highest (Kudo and Richardson 2018, section 3.1); as merges in order of score
that is a byte-pair encoding with bytes to fall back on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from headfold.runtime.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # token types of the GGUF specification
_SPACE = "\u2581"


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a file's metadata names; `ends` are those of a text, of a turn and of a message."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None

    @staticmethod
    def read(metadata: Mapping[str, Any]) -> "SpecialTokens":
        """From a file's metadata."""

        def token(name: str) -> int | None:
            value = metadata.get(f"tokenizer.ggml.{name}_token_id")
            return None if value is None else int(value)

        ends = (token(name) for name in ("eos", "eot", "eom"))
        return SpecialTokens(token("bos"), tuple(dict.fromkeys(x for x in ends if x is not None)), token("padding"))


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, the type of each, and the score of each where SentencePiece made them."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @staticmethod
    def read(metadata: Mapping[str, Any], path: Path) -> "Vocabulary":
        """From a file's metadata.

        Raises:
            CheckpointError: the lists do not belong together, or a special token is none of them.
        """
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
        lists = (tokens, types, scores)
        if not all(isinstance(each, list) and len(each) == len(tokens) for each in lists):
            raise CheckpointError(
                "its tokens, their types and scores are lists of different lengths",
                where=path,
                fix="Download it again.",
            )
        if not all(isinstance(token, str) for token in tokens):
            raise CheckpointError("its tokens are no texts", where=path, fix="Download it again.")
        for name, value in metadata.items():
            if name.startswith("tokenizer.ggml.") and name.endswith("_token_id") and not 0 <= int(value) < len(tokens):
                raise CheckpointError(f"{name} is {value}, and no token", where=path, fix="Download it again.")
        return Vocabulary(tokens, types, scores)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self.tokens, self.types, strict=True)


def sentencepiece_tokenizer(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer; special tokens and what stands before a text are the caller's."""
    known = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = next((token for token, kind in vocabulary if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=known, merges=_merges(vocabulary, known), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(_SPACE)] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(vocabulary: Vocabulary, known: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, best piece first, then as SentencePiece finds them, from the left."""
    found = []
    for index, (piece, kind) in enumerate(vocabulary):
        if kind in (CONTROL, BYTE, UNKNOWN):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((-vocabulary.scores[index], known[left], known[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
