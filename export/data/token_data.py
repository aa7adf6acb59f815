"""Token ids to train on: one long memory-mapped array, and the batch of any step as a pure function of seed, step and rank.

`documents.py` reads text from files and data sets; here it is tokenized, once, into a cache named by the hash of what went in.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from torch import Tensor

from headfold.export.data.documents import Piece, fingerprint, pieces
from headfold.export.exportables.facts import Facts
from headfold.export.model.config import ModelConfig
from headfold.export.progress import Reporter
from headfold.export.publishing import one_line, publish_file, recover
from headfold.runtime.errors import DataError

_FORMAT = "1"  # of the cache: another number, another name
_BATCH_PIECES = 256  # that the tokenizer gets at a time, to use its threads


@dataclass(frozen=True)
class TokenData:
    """A run of token ids. `fingerprint` identifies them, so that a resumed run can tell whether it gets the same data."""

    ids: NDArray[Any]  # [N], uint16 or uint32
    fingerprint: str

    @staticmethod
    def from_ids(ids: ArrayLike) -> "TokenData":
        """Ids that are in memory already, integers from 0 on.

        Raises:
            DataError: they are something else.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
            raise DataError(
                f"token ids are {array.dtype} of shape {array.shape}",
                fix="They must be one row of integers, 0 or more.",
            )
        stored = array.astype(_dtype(int(array.max(initial=0)) + 1))
        return TokenData(stored, hashlib.sha256(stored.tobytes()).hexdigest())

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, holdout: float) -> tuple["TokenData", "TokenData"]:
        """All but the last `holdout` share of the tokens, to train on, and that share, to validate on."""
        cut = len(self.ids) - int(len(self.ids) * holdout)
        return (
            TokenData(self.ids[:cut], f"{self.fingerprint}[:{cut}]"),
            TokenData(self.ids[cut:], f"{self.fingerprint}[{cut}:]"),
        )

    def windows(self, sequence: int) -> int:
        """How many windows of `sequence` tokens and their next ones there are; they do not overlap."""
        return max(len(self.ids) - 1, 0) // sequence

    def batch(self, seed: int, step: int, batch: int, sequence: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows of one process in one step: int64 [batch / world, sequence + 1], inputs and, one further, labels.

        Every window is seen once per epoch, in an order of its own in each. Nothing but the arguments decides, so a run resumes from
        its step alone, and the processes of a step have together what one process would have.
        """
        windows, share = self.windows(sequence), batch // world
        first = step * batch + rank * share
        rows = np.empty((share, sequence + 1), np.int64)
        for row, sample in enumerate(range(first, first + share)):
            window = _order(windows, seed, sample // windows)[sample % windows]
            rows[row] = self.ids[window * sequence : (window + 1) * sequence + 1]
        return torch.from_numpy(rows)

    def spread(self, sequences: int, sequence: int) -> Tensor:
        """Windows spread evenly over the data, to validate on: int64 [at most sequences, sequence + 1]."""
        windows = self.windows(sequence)
        count = min(sequences, windows)
        starts = (np.arange(count) * windows // max(count, 1)) * sequence
        rows = self.ids[starts[:, None] + np.arange(sequence + 1)]
        return torch.from_numpy(rows.astype(np.int64))


@lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation. Sorting Philox's raw output: unlike Generator.permutation, numpy promises never to change it."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(windows), kind="stable")


def tokenize(
    sources: Sequence[str],
    tokenizer: bytes | None,
    config: ModelConfig | Facts,
    reporter: Reporter,
    text_field: str = "text",
    cache: Path | None = None,
) -> TokenData:
    """The sources' tokens, from the cache if they were tokenized before.

    Documents follow each other, each ended by the model's first end token (none if it has none), as in the packing of GPT-3
    (Brown et al. 2020, appendix B): attention is not masked between them. A text file is one document.

    Args:
        sources: see `headfold.export.data.documents.pieces`; or one `.npy` file of token ids.
        tokenizer: the content of the model's tokenizer.json; None if it has none.
        config: for the size of the vocabulary and the end token.
        reporter: told what goes on.
        text_field: column of JSONL, parquet and data sets that holds the text.
        cache: directory for the token files. [default: $XDG_CACHE_HOME/headfold/tokens]

    Raises:
        DataError: a source is missing, unreadable, or they have no text; no tokenizer; no room for the cache.
    """
    if not sources:
        raise DataError("no data", fix="Name files, directories or a data set with --data.")
    if len(sources) == 1 and sources[0].endswith(".npy"):
        return _ready_made(Path(sources[0]), config.vocab_size)
    if made := next((source for source in sources if source.endswith(".npy")), None):
        raise DataError("has tokens already, so nothing comes with it", where=made, fix="Name it alone with --data.")
    if tokenizer is None:
        raise DataError("the checkpoint has no tokenizer.json", fix="Add it, or give --data a .npy file of token ids.")
    key = hashlib.sha256()
    for part in (_FORMAT, text_field, str(config.vocab_size), str(config.eos_token_id[:1])):
        key.update(part.encode() + b"\0")
    key.update(hashlib.sha256(tokenizer).digest())
    for source in sources:
        key.update(fingerprint(source))
    dtype = _dtype(config.vocab_size)
    name = key.hexdigest()
    path = (cache or _default_cache()) / f"{name}.{np.dtype(dtype).name}"
    recover(path)
    if not path.is_file():
        with reporter.step(f"tokenize {', '.join(sources)}"):
            _write(path, dtype, _encode(sources, text_field, Tokenizer.from_buffer(tokenizer), config))
    if not path.stat().st_size:
        raise DataError("has no text", where=", ".join(sources), fix="Name data with some.")
    return TokenData(np.memmap(path, dtype, "r"), name)


def _ready_made(path: Path, vocab_size: int) -> TokenData:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"is no array of numpy: {error}", where=path, fix="Save one with numpy.save.") from error
    try:
        data = TokenData.from_ids(array)
    except DataError as error:
        raise DataError(error.what, where=path, fix=error.fix) from error
    if not len(data):
        raise DataError("has no tokens", where=path, fix="Name data with some.")
    _check_range(array, vocab_size, path)
    return data


def _encode(
    sources: Sequence[str], field: str, tokenizer: Tokenizer, config: ModelConfig | Facts
) -> Iterator[NDArray[Any]]:
    """Arrays of ids, in order."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = list(config.eos_token_id[:1])

    def encode(batch: list[Piece]) -> NDArray[Any]:
        encoded = tokenizer.encode_batch([piece.text for piece in batch], add_special_tokens=False)
        parts = [one.ids + (end if piece.last else []) for one, piece in zip(encoded, batch, strict=True)]
        ids = np.array([token for part in parts for token in part], np.int64)
        _check_range(ids, config.vocab_size, "tokenizer.json")
        return ids

    batch: list[Piece] = []
    for source in sources:
        for piece in pieces(source, field):
            batch.append(piece)
            if len(batch) == _BATCH_PIECES:
                yield encode(batch)
                batch = []
    if batch:
        yield encode(batch)


def _check_range(ids: NDArray[Any], vocab_size: int, where: object) -> None:
    if ids.size and int(ids.max()) >= vocab_size:
        raise DataError(
            f"token {int(ids.max())} is not in the model's vocabulary of {vocab_size}",
            where=where,
            fix="Take the tokenizer that belongs to the checkpoint.",
        )


def _write(path: Path, dtype: type[np.unsignedinteger[Any]], arrays: Iterator[NDArray[Any]]) -> None:
    """Complete or not at all."""

    def write(stage: Path) -> None:
        with stage.open("wb") as file:
            for ids in arrays:
                file.write(ids.astype(dtype).tobytes())

    with one_line(
        DataError, path.parent, "Choose another place with the variable XDG_CACHE_HOME; uptrain and sweep have --cache."
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_file(path, write)


def _dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headfold" / "tokens"
