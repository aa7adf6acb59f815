"""Put files into a bundle that exists. It is replaced as a whole or not at all, and keeps what others put there meanwhile."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headfold.export.bundle.writer import file_entry, write_json
from headfold.export.publishing import one_line, publish
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import MANIFEST, Manifest, read_manifest


@contextmanager
def adding(bundle: Path, update: Callable[[Manifest], Manifest], instead_of: str | None = None) -> Iterator[Path]:
    """A directory whose files the bundle has when the block ends well, over its own of the same names.

    Args:
        bundle: where they go; nobody else adds to it while they are put there.
        update: makes the new manifest of the one that is there by then, all but its files; raises where they do not go together.
        instead_of: a directory of the bundle that they replace as a whole.

    Raises:
        BundleError: the bundle is gone or damaged by then, or the disk is full.
    """
    seen: set[str] = set()

    def take_over(old: Path, new: Path) -> None:
        manifest = update(read_manifest(old))
        seen.update(_names(old))
        made = {name: file_entry(new / name) for name in _names(new)}
        replaced = {name for name in seen if instead_of is not None and name.startswith(f"{instead_of}/")}
        kept = seen - replaced - made.keys() - {MANIFEST}
        for name in kept:
            _share(old / name, new / name)
        files = {name: entry for name, entry in manifest.files.items() if name in kept} | made
        write_json(new / MANIFEST, manifest.model_copy(update={"files": dict(sorted(files.items()))}).model_dump())

    def check_seen(old: Path) -> None:
        if late := _names(old) - seen:
            raise BundleError(f"got {min(late)} just now", where=bundle, fix="Start again.")

    with one_line(BundleError, bundle, "Free some space, or copy the bundle to where you may write."):
        try:
            with publish(bundle, check_seen, take_over) as stage:
                yield stage
        except FileNotFoundError as error:
            if bundle.exists():
                raise
            raise BundleError("is gone", where=bundle, fix="Start again where it is now.") from error


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _share(source: Path, target: Path) -> None:
    """The same bytes under another name: a link to them, where the disk has such."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # of a hub's cache the file itself
    except OSError:
        shutil.copy2(source, target)
