"""An engine file against its manifest entry, by its header alone: no TensorRT and no GPU needed.

TensorRT-RTX 1.x, 64 bytes, little-endian; observed, not documented by NVIDIA: magic at 0 and 28, size of the file at 16 (u64),
version at 24 (four bytes), compute capabilities at 32 (u32, a bit each).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from headfold.plugins.gpus import RTX_CAPABILITIES
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import EngineEntry

HEADER_BYTES = 64
REBUILD = "Build it again with headfold build --force."
_MAGIC = b"vtrt"
_FIELDS = struct.Struct("<4s12xQ4B4sI28x")


@dataclass(frozen=True)
class EngineHeader:
    """What the header says."""

    size: int  # bytes of the file
    version: str
    compute_capabilities: list[int]


def read_header(path: Path) -> EngineHeader:
    """Read the header of a TensorRT-RTX engine.

    Raises:
        BundleError: it is missing, shorter than a header, or no engine.
    """
    if not path.is_file():
        raise BundleError("is missing", where=path, fix=REBUILD)
    with path.open("rb") as file:
        content = file.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES:
        raise BundleError(f"has {len(content)} bytes, not even a header's {HEADER_BYTES}", where=path, fix=REBUILD)
    magic, size, *version, again, bits = _FIELDS.unpack(content)
    if magic != _MAGIC or again != _MAGIC:
        raise BundleError("is no TensorRT-RTX engine", where=path, fix=REBUILD)
    capabilities = [sm for bit, sm in enumerate(RTX_CAPABILITIES) if bits >> bit & 1]
    return EngineHeader(size, ".".join(map(str, version)), capabilities)


def check_engine(bundle: Path, entry: EngineEntry) -> None:
    """Hold a TensorRT-RTX engine's header to its manifest entry. Full TensorRT's header is not known here: only its size is checked.

    Raises:
        BundleError: it is truncated, of another version, or for other GPUs than the manifest says.
    """
    path = bundle / entry.file
    if entry.flavour != "tensorrt-rtx":
        return
    header = read_header(path)
    if header.size != path.stat().st_size:
        raise BundleError(
            f"is truncated or padded: its header says {header.size} bytes, it has {path.stat().st_size}",
            where=path,
            fix=REBUILD,
        )
    if header.version != entry.version:
        raise BundleError(
            f"was built by TensorRT-RTX {header.version}, its manifest says {entry.version}", where=path, fix=REBUILD
        )
    if header.compute_capabilities != sorted(entry.compute_capabilities):
        raise BundleError(
            f"is for SM {_listed(header.compute_capabilities)}, its manifest says {_listed(entry.compute_capabilities)}",
            where=path,
            fix=REBUILD,
        )


def _listed(capabilities: list[int]) -> str:
    return ", ".join(map(str, capabilities)) or "no GPU"
