"""Write a bundle so that it is either complete or not there, and replaces nothing but a bundle of ours.

`headfold.runtime.manifest` says what a bundle is; this file only writes one.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headfold.export.publishing import one_line, publish, recover, unfinished
from headfold.runtime.errors import BundleError, HeadfoldError
from headfold.runtime.manifest import MANIFEST, FileEntry, Manifest, read_manifest, sha256

_FIX = "Free some space or choose another place with -o."


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `output` that takes its place when the block ends without an exception, and vanishes otherwise.

    With `force` it replaces a bundle.

    Raises:
        BundleError: `output` exists and `force` is not set, or it is no bundle of ours; its parent is no directory; the disk is full.
    """
    check_output(output, force)
    with one_line(BundleError, output, _FIX), publish(output, check_ours if force else None) as stage:
        yield stage


@contextmanager
def for_the_next(output: Path) -> Iterator[Callable[[], Path]]:
    """What makes a directory that an export to `output` which does not finish leaves for the next one to go on with.

    Raises:
        BundleError: when it is made while another export to there is at work.
    """
    with unfinished(output) as make:

        def make_alone() -> Path:
            try:
                return make()
            except BlockingIOError as error:
                raise BundleError(
                    "another export to there is at work", where=output, fix="Wait for it, or choose another place."
                ) from error

        yield make_alone


def check_output(output: Path, force: bool) -> None:
    """Refuse an output before any work is done for it, after undoing what killed processes left of it; see `staged`."""
    with one_line(BundleError, output, "Choose another place with -o."):
        recover(output)
        if output.exists():
            if os.path.ismount(output):
                raise BundleError(
                    "is a mount point, so nothing takes its place", where=output, fix="Choose a name in it."
                )
            check_ours(output)
            if not force:
                raise BundleError(
                    "already exists", where=output, fix="Choose another place, or replace it with --force."
                )
        parent = output.resolve().parent
        for above in (parent, *parent.parents):
            if _is_bundle(above):  # which holds nothing but what its manifest lists
                raise BundleError("is in a bundle", where=output, fix=f"Choose a place that is not in {above}.")
        if not parent.is_dir():
            raise BundleError("is no directory", where=parent, fix="Create it first.")


def _is_bundle(directory: Path) -> bool:
    try:
        return (directory / MANIFEST).is_file() and bool(read_manifest(directory))
    except BundleError:
        return False


def check_ours(output: Path) -> None:
    """Refuse to replace anything but a bundle, with nothing in it that its manifest does not list, or an empty directory."""
    if output.is_dir() and not any(output.iterdir()):
        return
    try:
        manifest = read_manifest(output)
    except BundleError as error:
        raise BundleError(
            "exists and is no bundle, so --force does not replace it", where=output, fix="Choose another place."
        ) from error
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name != MANIFEST and name not in manifest.files:
            raise BundleError(
                f"holds {name}, which is not of the bundle, so --force does not replace it",
                where=output,
                fix="Move that file elsewhere, or choose another place.",
            )


def write_file(path: Path, content: bytes) -> None:
    """Write one file of a staged bundle; its name must not lead out of it."""
    if path.name in {"", ".", ".."}:
        raise HeadfoldError("not a file name", where=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of a staged bundle: indented, sorted as given, with a newline at its end."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def manifest_of(directory: Path, **fields: Any) -> Manifest:
    """The manifest of a staged bundle, with size and SHA-256 of every file in it; `fields` are all its other fields."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return Manifest(files={p.relative_to(directory).as_posix(): file_entry(p) for p in paths}, **fields)


def file_entry(path: Path) -> FileEntry:
    """What a manifest says of a file."""
    return FileEntry(size=path.stat().st_size, sha256=sha256(path))
