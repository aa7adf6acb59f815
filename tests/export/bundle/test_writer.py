"""Bundles appear whole or not at all: exceptions, kill -9, leftovers of dead processes, replacement."""

import mmap
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from least_bundle import fill

from headfold.export.bundle.writer import check_output, staged
from headfold.runtime import BundleError
from headfold.runtime.manifest import read_manifest

PROGRAM = Path(sys.executable).parent / "headfold"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_finished_block_is_published(tmp_path) -> None:
    with staged(tmp_path / "b", force=False) as stage:
        fill(stage, 1)
        assert not (tmp_path / "b").exists()
    assert names(tmp_path) == ["b"]
    assert read_manifest(tmp_path / "b").vocab_size == 1


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path) -> None:
    with staged(tmp_path / "b", force=False) as stage:
        fill(stage, 1)
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "b", force=True) as stage:
        fill(stage, 2 // 0)
    assert names(tmp_path) == ["b"]
    assert read_manifest(tmp_path / "b").vocab_size == 1


def test_force_replaces_a_bundle(tmp_path) -> None:
    for content in (1, 2):
        with staged(tmp_path / "b", force=content == 2) as stage:
            fill(stage, content)
    assert names(tmp_path) == ["b"]
    assert read_manifest(tmp_path / "b").vocab_size == 2


def web_app(directory: Path) -> None:
    directory.mkdir()
    (directory / "manifest.json").write_text('{"name": "my app", "icons": []}')


def bundle_with_notes(directory: Path) -> None:
    with staged(directory, force=False) as stage:
        fill(stage, 1)
    (directory / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (web_app, "exists and is no bundle, so --force does not replace it"),
        (bundle_with_notes, "holds notes.txt, which is not of the bundle, so --force does not replace it"),
        (lambda path: path.write_text("a file"), "exists and is no bundle"),
    ],
    ids=["a web app", "notes in a bundle", "a file"],
)
def test_force_replaces_nothing_else(make, message, tmp_path) -> None:
    make(tmp_path / "b")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match=message), staged(tmp_path / "b", force=True) as stage:
        fill(stage, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_that_appears_meanwhile_is_not_touched(tmp_path) -> None:
    def export() -> None:
        with staged(tmp_path / "b", force=False) as stage:
            fill(stage, 1)
            web_app(tmp_path / "b")

    with pytest.raises(BundleError, match="already exists"):
        export()
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["manifest.json"]


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch) -> None:
    (tmp_path / "b").mkdir()  # empty, as a container's volume
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "b")
    with pytest.raises(BundleError, match="is a mount point, so nothing takes its place"):
        check_output(tmp_path / "b", force=True)


def test_permission_is_one_line(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("headfold.export.publishing.sync_tree", refuse)
    with pytest.raises(BundleError, match="cannot write: Permission denied"), staged(tmp_path / "b", False) as stage:
        fill(stage, 1)
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a directory in which nobody makes any")
def test_a_place_where_no_directory_can_be_made_is_one_line() -> None:
    with (
        pytest.raises(BundleError, match="cannot write: no directory can be made there"),
        staged(Path("/proc/b"), False),
    ):
        raise AssertionError


def test_manifest_lists_every_file_with_its_hash(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f").write_bytes(b"abc")
    manifest = fill(tmp_path, 1)
    assert list(manifest.files) == ["model.onnx", "sub/f"]
    # the SHA-256 of "abc", FIPS 180-2 appendix B.1
    assert manifest.files["sub/f"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_kill_9_in_the_middle_leaves_nothing_that_looks_finished(toy_checkpoint, tmp_path) -> None:
    command = [PROGRAM, "export", toy_checkpoint, "-o", tmp_path / "b", "-q", "--no-verify"]
    process = subprocess.Popen(command)
    while not list(tmp_path.glob(".headfold-stage-*")):  # until it has begun to write
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.rglob("manifest.json"))
    assert subprocess.run(command, check=False).returncode == 0
    assert names(tmp_path) == ["b"]  # and the next try cleans up


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the whole process's")
def test_the_peak_of_an_export_is_not_that_of_what_came_before_it() -> None:
    from headfold.export.bundle import pipeline

    size = 256 << 20  # bytes; a mapping of its own, for malloc may keep what is freed
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as large:
        large.write(bytes(size))
        peak = pipeline._peak_memory()
    assert peak > size
    pipeline._forget_peak_memory()
    assert pipeline._peak_memory() < peak - (128 << 20)
