"""Real English without the network's help beyond Debian's archive: six novels by Jane Austen and the King James Bible, both public
domain, out of the packages r-cran-janeaustenr and bible-kjv-text; where `apt-get download` cannot fetch them, Python's own
documentation and sources.
"""

import itertools
import lzma
import pydoc_data.topics
import struct
import subprocess
import sysconfig
import tempfile
import zlib
from pathlib import Path

PACKAGES = ("r-cran-janeaustenr", "bible-kjv-text")
VALIDATION = 0.05  # the end of each text


def corpus(cache: Path) -> tuple[Path, Path, str]:
    """Text files for training and validation under `cache`, made at the first call, and a line that says what they are."""
    train, validation, about = cache / "train.txt", cache / "validation.txt", cache / "about.txt"
    if not about.exists():
        cache.mkdir(parents=True, exist_ok=True)
        texts, source = _texts()
        cuts = [int(len(text) * (1 - VALIDATION)) for text in texts]
        train.write_text("\n".join(text[:cut] for text, cut in zip(texts, cuts, strict=True)))
        validation.write_text("\n".join(text[cut:] for text, cut in zip(texts, cuts, strict=True)))
        about.write_text(source)  # last: it says that the others are complete
    return train, validation, about.read_text()


def _texts() -> tuple[list[str], str]:
    with tempfile.TemporaryDirectory() as folder:
        fetched = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
        packages = sorted(Path(folder).glob("*.deb"))
        if fetched.returncode == 0 and len(packages) == len(PACKAGES):
            for package in packages:
                subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
            novels = austen(Path(folder, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
            bible = king_james(Path(folder, "usr/lib/bible.data").read_bytes())
            return [*novels, bible], "six novels by Jane Austen and the King James Bible"
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text(errors="ignore") for path in sorted(library.glob("*.py"))]
    topics = pydoc_data.topics.topics
    return [
        "\n".join(topics[name] for name in sorted(topics)),
        "\n".join(sources),
    ], "Python's documentation and sources"


def king_james(data: bytes) -> str:
    """The text of bible.data: 68 LZW blocks without their magic number, whose offsets stand big-endian at byte 92."""
    offsets = struct.unpack(">69i", data[92 : 92 + 69 * 4])
    blocks = [b"\x1f\x9d\x90" + data[start:end] for start, end in itertools.pairwise(offsets)]
    text = b"".join(subprocess.run(["gzip", "-dc"], input=b, capture_output=True, check=True).stdout for b in blocks)
    return text.decode("ascii", errors="ignore")


def austen(data: bytes) -> list[str]:
    """Every character vector of an R lazy-load database: a length, perhaps a letter for the method, then compressed XDR."""
    novels, position = [], 0
    while position < len(data):
        (size,) = struct.unpack(">I", data[position : position + 4])
        body = data[position + 5 :] if data[position + 4 : position + 5] == b"Z" else data[position + 4 :]
        if len(body) == len(data) - position - 5:
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
            unpacked: lzma.LZMADecompressor | zlib._Decompress = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        else:
            unpacked = zlib.decompressobj()
        raw = unpacked.decompress(body)
        assert len(raw) == size
        position = len(data) - len(unpacked.unused_data)
        text = _character_vector(raw)
        if text:
            novels.append(text)
    return novels


def _character_vector(raw: bytes) -> str:
    """The lines of an R serialization (format X, version 2 or 3) that is a character vector; else nothing."""
    position, version = 14, struct.unpack(">i", raw[2:6])[0]
    if version == 3:  # the name of the native encoding
        position += 4 + struct.unpack(">i", raw[position : position + 4])[0]
    flags, count = struct.unpack(">ii", raw[position : position + 8])
    if flags & 255 != 16:  # STRSXP
        return ""
    position, lines = position + 8, []
    for _ in range(count):
        length = max(struct.unpack(">i", raw[position + 4 : position + 8])[0], 0)  # -1 is NA
        lines.append(raw[position + 8 : position + 8 + length].decode("utf-8", errors="ignore"))
        position += 8 + length
    return "\n".join(lines)
