"""A model as huggingface_hub's snapshot_download leaves it: links into the hub's cache of blobs."""

import shutil
from pathlib import Path

from headfold.runtime.manifest import sha256


def hub_snapshot(source: Path, root: Path) -> Path:
    """The snapshot, under `root`, of the files in `source`; its blobs are named by their SHA-256."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = Path(shutil.copy(file, blobs / sha256(file)))
        (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))
    return snapshot
