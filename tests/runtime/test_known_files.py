"""SHA-256 of large files is remembered while nothing touches them; whatever happens to the memory, a changed file is found out."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from headfold.runtime import BundleError, load
from headfold.runtime.files import known_files
from headfold.runtime.manifest import Manifest, check_files, read_manifest, sha256

DATA = "model.onnx.data"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read to be hashed."""
    names: list[str] = []

    def spy(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(known_files, "sha256", spy)
    monkeypatch.setattr(known_files, "_LARGE", 8192)  # the toy's weights are over it, its other files are not
    return names


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headfold" / "sha256"


@pytest.fixture
def bundle(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the toy's, long ago by the clock of who loads it: only what has settled is remembered."""
    path = shutil.copytree(toy.path, tmp_path / "bundle")
    monkeypatch.setattr(known_files, "time", type("Later", (), {"time_ns": lambda: time.time_ns() + 10**10}))
    return path


def flip(path: Path) -> None:
    """Change one bit in place, and give the file the times of before, as far as a program can."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of its name, with the times of before."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def check(bundle: Path, manifest: Manifest) -> None:
    with known_files.known_files(bundle) as digest:
        check_files(bundle, manifest, digest)


def test_a_large_file_is_hashed_once(bundle: Path, cache: Path, hashed: list[str]) -> None:
    load(bundle).close()
    assert hashed.count(DATA) == 1
    hashed.clear()
    load(bundle).close()
    assert "tokenizer.json" in hashed
    assert DATA not in hashed
    assert [path.suffix for path in cache.iterdir()] == [".json"]


@pytest.mark.parametrize("change", [flip, replaced])
def test_a_changed_file_is_found_out(
    change: Callable[[Path], None], bundle: Path, cache: Path, hashed: list[str]
) -> None:
    load(bundle).close()
    assert list(cache.iterdir())
    change(bundle / DATA)
    for _ in range(2):  # and that it is wrong is not remembered as right
        with pytest.raises(BundleError, match="does not have the SHA-256"):
            load(bundle)


def test_a_link_to_another_file_is_found_out(bundle: Path, cache: Path, hashed: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (bundle / DATA).rename(first)
    shutil.copy(first, second)
    flip(second)
    manifest = read_manifest(bundle)
    for target, right in ((first, True), (first, True), (second, False), (first, True)):
        (bundle / DATA).unlink(missing_ok=True)
        (bundle / DATA).symlink_to(target)
        with nullcontext() if right else pytest.raises(BundleError, match="does not have the SHA-256"):
            check(bundle, manifest)
    assert hashed.count(DATA) == 2


def test_what_was_just_written_is_not_remembered(toy, cache: Path, hashed: list[str], tmp_path: Path) -> None:
    path = shutil.copytree(toy.path, tmp_path / "new")
    load(path).close()
    load(path).close()
    assert hashed.count(DATA) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": [[1, 2], "no"]}', b"\xff" * 100, b"[" * 10**6])
def test_a_damaged_memory_is_no_memory(content: bytes, bundle: Path, cache: Path, hashed: list[str]) -> None:
    load(bundle).close()
    (record,) = cache.iterdir()
    right = record.read_bytes()
    record.write_bytes(content)
    load(bundle).close()
    assert hashed.count(DATA) == 2
    assert record.read_bytes() == right


def test_a_cache_directory_that_cannot_be_written(
    bundle: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory, for root too")
    for place in (str(tmp_path / "file"), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        load(bundle).close()
    assert hashed.count(DATA) == 2
    assert not Path("relative").exists()


def test_processes_that_load_at_once(bundle: Path, cache: Path) -> None:
    code = (
        "import sys, time; from headfold.runtime.files import known_files; from pathlib import Path;"
        "known_files._LARGE, known_files._SETTLED = 8192, -10**10\n"
        "for _ in range(30):\n"
        f"    with known_files.known_files(Path(sys.argv[1])) as digest: print(digest(Path(sys.argv[1], {DATA!r})))\n"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert told == [sha256(bundle / DATA)] * 90
    assert len(list(cache.iterdir())) == 1
