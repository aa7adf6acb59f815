"""Write a bundle so that it is either complete or not there: staged beside its place, synced to disk, then renamed.

`headfold.runtime.manifest` says what a bundle is; this file only writes one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from headfold.export.files import CANNOT_WRITE, remove_leftovers, sync, sync_tree
from headfold.runtime.errors import BundleError, HeadfoldError
from headfold.runtime.manifest import MANIFEST, FileEntry, Manifest, sha256

_PARTIAL = ".headfold-partial-"


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `output` that takes its place when the block ends without an exception, and vanishes otherwise.

    A directory that a killed process left is removed by the next call for the same place.

    Raises:
        BundleError: `output` exists and `force` is not set, its parent is no directory, or the disk is full.
    """
    check_output(output, force)
    output = output.absolute()
    remove_leftovers(output.parent, f".{escape(output.name)}{_PARTIAL}*")
    stage = output.parent / f".{output.name}{_PARTIAL}{os.getpid()}"
    try:
        stage.mkdir()
        yield stage
        sync_tree(stage)
        replace(stage, output)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise BundleError(
            f"cannot write: {error.strerror or error}",
            where=output,
            fix="Free some space or choose another place with -o.",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already after a success


def check_output(output: Path, force: bool) -> None:
    """Refuse an output before any work is done for it; see `staged`."""
    if output.exists() and not force:
        raise BundleError("already exists", where=output, fix="Choose another place, or replace it with --force.")
    if output.exists() and not (output / MANIFEST).is_file() and any(output.iterdir() if output.is_dir() else [output]):
        raise BundleError(
            "exists and is no bundle, so --force does not replace it", where=output, fix="Choose another place."
        )
    if not output.absolute().parent.is_dir():
        raise BundleError("is no directory", where=output.absolute().parent, fix="Create it first.")


def replace(stage: Path, output: Path) -> None:
    """Rename `stage` to `output`; an old bundle there is moved aside first and removed last."""
    old = output.parent / f".{output.name}{_PARTIAL}old-{os.getpid()}"
    if output.exists():
        output.rename(old)
    stage.rename(output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write one file of a staged bundle; its name must not lead out of it."""
    if path.name in {"", ".", ".."}:
        raise HeadfoldError("not a file name", where=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of a staged bundle: indented, sorted as given, with a newline at its end."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_manifest(directory: Path, **fields: Any) -> Manifest:
    """Write the manifest of a staged bundle, with size and SHA-256 of every file in it; `fields` are all its other fields."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {p.relative_to(directory).as_posix(): FileEntry(size=p.stat().st_size, sha256=sha256(p)) for p in paths}
    manifest = Manifest(files=files, **fields)
    write_json(directory / MANIFEST, manifest.model_dump())
    return manifest
