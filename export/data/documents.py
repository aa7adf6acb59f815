"""Text out of files and data sets, in pieces small enough to tokenize; and a hash of the content, to name what was made of it.

A kind of file is one function in `_READERS`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headfold.runtime.errors import DataError

_PIECE = 1 << 16  # characters of a text file that are tokenized together
_WITH = " with --text-field (export and convert read 'text' alone)"

_HALF = re.compile("[\ud800-\udfff]")  # JSON can say one, and no tokenizer takes it


class Piece(NamedTuple):
    """Part of a document; `last` ends it."""

    text: str
    last: bool


def pieces(source: str, field: str) -> Iterator[Piece]:
    """The text of a source, piece by piece.

    A source is a file (.txt and .md: one document; .jsonl and .parquet: a document per row, in column `field`), a directory of such
    files, a data set saved with `Dataset.save_to_disk`, or `organisation/name[:config[:split]]` on the Hugging Face hub.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    path = _place(source)
    if path.is_dir() and not _is_saved_data_set(path):
        for file in _files(path):
            yield from _READERS[file.suffix](file, field)
    elif path.is_file():
        yield from _reader(path)(path, field)
    else:
        yield from _rows(_data_set(source), field, source)


def fingerprint(source: str) -> bytes:
    """A hash of everything that `pieces` would read.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    try:
        return _fingerprint(source)
    except OSError as error:  # or it would be taken for one of where something is written
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", where=source, fix="Name text that can be.") from error


def _fingerprint(source: str) -> bytes:
    path, digest = _place(source), hashlib.sha256()
    if path.is_dir() and not _is_saved_data_set(path):
        files = _files(path)
    elif path.is_file():
        _reader(path)
        files = [path]
    else:
        return hashlib.sha256(str(_data_set(source)._fingerprint).encode()).digest()
    for file in files:
        digest.update(file.suffix.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.digest()


def has_columns(source: str) -> bool:
    """Whether `pieces` may look for a column there: not in plain text."""
    path = _place(source)
    if path.is_dir() and not _is_saved_data_set(path):
        return any(file.suffix in _READERS and _READERS[file.suffix] is not _text for file in path.rglob("*"))
    return not path.is_file() or _READERS.get(path.suffix) is not _text


def _place(source: str) -> Path:
    if not source.strip():  # it would be the current directory, with all that is below
        raise DataError("is empty", where="the name of the data", fix="Name a file, a directory or a data set.")
    return Path(source)


def _files(directory: Path) -> list[Path]:
    files = sorted(file for file in directory.rglob("*") if file.suffix in _READERS and file.is_file())
    if not files:
        raise DataError(f"has no {', '.join(_READERS)} files", where=directory, fix="Name another directory.")
    return files


def _reader(path: Path) -> Callable[[Path, str], Iterator[Piece]]:
    if path.suffix not in _READERS:
        raise DataError(f"is none of {', '.join(_READERS)}", where=path, fix="Convert it to one of them.")
    return _READERS[path.suffix]


def _text(path: Path, field: str) -> Iterator[Piece]:
    """One document, cut after line ends where it has any."""
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while block := file.read(_PIECE):
                rest += block
                cut = rest.rfind("\n", 0, _PIECE) + 1 or _PIECE
                while len(rest) > _PIECE:
                    yield Piece(rest[:cut], False)
                    rest = rest[cut:]
                    cut = rest.rfind("\n", 0, _PIECE) + 1 or _PIECE
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error.reason}", where=path, fix="Convert it to UTF-8.") from error
    if rest:
        yield Piece(rest, True)


def _jsonl(path: Path, field: str) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError("is not JSON", where=where, fix="A line must hold one JSON object.") from error
            yield from _row(row if isinstance(row, dict) else {}, field, where)


def _parquet(path: Path, field: str) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise _no_column(field, file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=[field]):
            for number, text in enumerate(batch.column(0).to_pylist()):
                yield from _row({field: text}, field, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"is no parquet file: {error}", where=path, fix="Download it again.") from error


def _row(row: dict[str, Any], field: str, where: str) -> Iterator[Piece]:
    text = row.get(field)
    if not isinstance(text, str):
        raise DataError(f"has no text in {field!r}", where=where, fix=f"Name the column that has it{_WITH}.")
    if _HALF.search(text):
        raise DataError(
            f"holds half of a surrogate pair in {field!r}, which is no character", where=where, fix="Leave it out."
        )
    if text:
        yield Piece(text, True)


def _no_column(field: str, columns: list[str], where: object) -> DataError:
    return DataError(f"has no column {field!r}", where=where, fix=f"Name one{_WITH}: {', '.join(columns)}.")


def _is_saved_data_set(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _data_set(source: str) -> Any:
    """A split of a Hugging Face data set."""
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    saved = _is_saved_data_set(Path(source))
    if not saved and (name.count("/") != 1 or name.startswith((".", "/")) or Path(name).suffix in _READERS):
        raise DataError(
            "no such file or directory",
            where=source,
            fix="Name a file, a directory, or organisation/name of a data set.",
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        return (
            datasets.load_from_disk(source)
            if saved
            else datasets.load_dataset(name, config or None, split=split or "train")
        )
    except Exception as error:  # whatever the hub's client or the data set's format raises
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"is no file here, and cannot be fetched from the hub: {reason}", where=source, fix="Download it."
        ) from error


def _rows(data_set: Any, field: str, source: str) -> Iterator[Piece]:
    if field not in data_set.column_names:
        raise _no_column(field, data_set.column_names, source)
    for number, row in enumerate(data_set.select_columns([field])):
        yield from _row(row, field, f"{source}, row {number}")


_READERS: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
