"""Text to tokens to batches: every kind of source, the cache, and the order of batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.data.token_data import TokenData, tokenize
from headfold.export.progress import Reporter
from headfold.runtime.errors import DataError

QUIET = Reporter(quiet=True)


@pytest.fixture
def read(toys, tmp_path):
    checkpoint = open_checkpoint(toys / "mha")

    def read(*sources: Path | str, **options) -> TokenData:
        names = [str(source) for source in sources]
        return tokenize(
            names, checkpoint.tokenizer.definition, checkpoint.config, QUIET, cache=tmp_path / "cache", **options
        )

    return read


def text_of(data: TokenData, toys: Path) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(toys / "mha" / "tokenizer.json")).decode(
        data.ids.tolist(), skip_special_tokens=False
    )


def test_a_text_file_is_one_document_and_loses_nothing(read, toys, tmp_path):
    text = "été · 東京\r\n" * 20000 + "end"  # several pieces; characters of several bytes at their edges
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert text_of(read(tmp_path / "a.txt"), toys) == text + "<end>"
    long = "x" * 200_000  # no line end to cut at
    (tmp_path / "b.txt").write_text(long)
    assert text_of(read(tmp_path / "b.txt"), toys) == long + "<end>"


def test_rows_of_jsonl_and_parquet_and_data_sets_are_documents(read, toys, tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows = ["one", "two\nlines", "drei"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": rows}), tmp_path / "b.parquet")
    datasets.Dataset.from_dict({"body": rows}).save_to_disk(tmp_path / "c")
    expected = "".join(row + "<end>" for row in rows)
    for name in ("a.jsonl", "b.parquet", "c"):
        assert text_of(read(tmp_path / name, text_field="body"), toys) == expected
    (tmp_path / "all").mkdir()
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).rename(tmp_path / "all" / name)
    assert text_of(read(tmp_path / "all", text_field="body"), toys) == 2 * expected


def test_a_data_set_of_the_hub_is_asked_for_by_name_configuration_and_split(read, toys, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["hub"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert text_of(read("some/data:en:validation"), toys) == "hub<end>"
    assert set(asked) == {("some/data", "en", "validation")}


def test_tokens_are_kept_by_content_and_memory_mapped(read, toys, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("something")
    first = read(path)
    assert isinstance(first.ids, np.memmap)
    assert first.ids.dtype == np.uint16
    path.rename(tmp_path / "b.txt")
    monkeypatch.setattr("headfold.export.data.token_data._write", None)  # would fail if it were called
    second = read(tmp_path / "b.txt")
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.ids, first.ids)
    monkeypatch.undo()
    (tmp_path / "b.txt").write_text("something else")
    assert read(tmp_path / "b.txt").fingerprint != first.fingerprint
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half-written


def test_large_vocabularies_take_four_bytes():
    assert TokenData.from_ids([0, 65535]).ids.dtype == np.uint16
    assert TokenData.from_ids([0, 65536]).ids.dtype == np.uint32


def test_each_epoch_sees_every_window_once_in_another_order():
    data = TokenData.from_ids(np.arange(0, 32 * 10 + 1))
    epochs = [torch.cat([data.batch(7, step, 2, 10) for step in range(e * 16, e * 16 + 16)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 320, 10))
        assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(32, 10, dtype=torch.int64))  # consecutive tokens
    assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()
    assert not torch.equal(data.batch(7, 0, 4, 10), data.batch(8, 0, 4, 10))


def test_ranks_share_what_one_process_would_have():
    data = TokenData.from_ids(np.arange(1000))
    for step in (0, 5, 12):  # 12: across the end of an epoch
        whole = data.batch(3, step, 8, 10)
        assert torch.equal(torch.cat([data.batch(3, step, 8, 10, rank, 4) for rank in range(4)]), whole)


def test_the_order_never_changes():
    """Pinned: a run that another version of headfold or numpy resumes must see the same batches."""
    assert TokenData.from_ids(np.arange(101)).batch(1, 2, 4, 10)[:, 0].tolist() == [10, 40, 0, 60]


BAD = {
    "missing file": (lambda d: d / "none.txt", "no such file or directory"),
    "unknown kind": (lambda d: write(d / "a.pdf", b"x"), "is none of .txt"),
    "empty text": (lambda d: write(d / "a.txt", b""), "has no text"),
    "not UTF-8": (lambda d: write(d / "a.txt", b"\xff\xfe"), "is not UTF-8"),
    "broken JSONL": (lambda d: write(d / "a.jsonl", b'{"text": "a"}\n{oops\n'), "line 2: is not JSON"),
    "other column": (
        lambda d: write(d / "a.jsonl", b'{"txt": "a"}\n'),
        "has no text in 'text'. Name the column that has it with --text-field (export and",
    ),
    "half a pair": (lambda d: write(d / "a.jsonl", b'{"text": "a\\ud800"}'), "line 1: holds half of a surrogate pair"),
    "nested without end": (lambda d: write(d / "a.jsonl", b"[" * 100_000), "line 1: is not JSON"),
    "a name too long": (lambda d: d / ("x" * 5000 + ".txt"), "cannot be read: File name too long. Name text that can"),
    "no name": (lambda d: Path(" "), "the name of the data: is empty"),
    "no parquet": (lambda d: write(d / "a.parquet", b"PAR1"), "is no parquet file"),
    "empty directory": (lambda d: d, "has no .txt"),
    "nothing of an array": (lambda d: write(d / "a.npy", b""), "is no array"),
    "pickled array": (lambda d: write(d / "a.npy", b"\x80\x04K\x01."), "is no array"),
    "floats": (lambda d: save(d / "a.npy", np.ones(9)), "must be one row of integers"),
    "id over the vocabulary": (lambda d: save(d / "a.npy", np.array([1, 999])), "token 999 is not in"),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def save(path: Path, array) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(read, tmp_path, case):
    make, message = BAD[case]
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        read(make(tmp_path / "data"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_tokenizer(toys, tmp_path):
    config = open_checkpoint(toys / "mha").config
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        tokenize([str(toys / "text.txt")], None, config, QUIET, cache=tmp_path)
