"""A TensorRT session over the fakes: a bundle with a made-up engine, and the session on it."""

import json
import shutil
from pathlib import Path

from fake_cuda import FakeCuda, write_kernels
from fake_tensorrt import FakeTensorRT

from headfold.export.bundle.writer import manifest_of, write_json
from headfold.plugins.attention.kernel_contract import KernelSpec
from headfold.plugins.gpus import RTX_CAPABILITIES
from headfold.runtime.files.engine_file import _FIELDS
from headfold.runtime.manifest import read_manifest, sha256
from headfold.runtime.tensorrt_session import TensorRTSession

TOLERANCE = 1e-5  # float32 logits of order 1, sums of a hundred products in another order
CAPACITY, MAX_BATCH, MAX_INPUT = 64, 4, 6
FILE = "engines/tensorrt-rtx-native.engine"
SPEC = KernelSpec(num_heads=6, kv_num_heads=2, head_dim=16, rotary_dim=16, dtype="float32", cache_dtype="float32")


def engine_bytes(capabilities=(86, 89), version=(1, 7, 1, 116)) -> bytes:
    bits = sum(1 << RTX_CAPABILITIES.index(sm) for sm in capabilities)
    body = b"not code"
    return _FIELDS.pack(b"vtrt", 64 + len(body), *version, b"vtrt", bits) + body


def shapes(new: int, batch: int) -> dict[str, dict[str, list[int]]]:
    ranges = {"input_ids": ([1, 1], [batch, new]), "attention_mask": ([1, 1], [batch, CAPACITY])}
    cache = ([1, 2, CAPACITY, 16], [batch, 2, CAPACITY, 16])
    ranges |= {f"past_key_values.{i}.{part}": cache for i in range(2) for part in ("key", "value")}
    return {name: {"min": low, "opt": high, "max": high} for name, (low, high) in ranges.items()}


def copy_with_engine(source: Path, path: Path, content: bytes | None = None, **changes) -> Path:
    """Copies a bundle and adds an engine to it; `changes` are of its entry."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("manifest.json"))
    manifest = json.loads((source / "manifest.json").read_text())
    del manifest["files"]
    (path / "engines").mkdir()
    (path / FILE).write_bytes(engine_bytes() if content is None else content)
    entry = {
        "file": FILE,
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "attention": "native",
        "dtype": "float32",
        "compute_capabilities": [86, 89],
        "max_batch": MAX_BATCH,
        "max_input": MAX_INPUT,
        "capacity": CAPACITY,
        "weight_streaming": False,
        "profiles": [
            {"name": "prefill", "shapes": shapes(MAX_INPUT, MAX_BATCH)},
            {"name": "decode", "shapes": shapes(1, MAX_BATCH)},
        ],
        "inputs": manifest["inputs"],
        "outputs": manifest["outputs"],
        "aliases": {},
        "plugin": None,
        "layers": {},
        "tools": {},
    } | changes
    if entry["plugin"]:
        (path / "kernels").mkdir()
        write_kernels(path / "kernels", SPEC, capabilities=(86,))
        entry["plugin"] = {"kernels_sha256": sha256(path / "kernels" / "kernels.json"), **entry["plugin"]}
    made = manifest_of(path, **manifest | {"format_version": 2, "engines": [entry]})
    write_json(path / "manifest.json", made.model_dump())
    return path


class Rig:
    """A session and the fakes under it."""

    def __init__(self, path: Path, decoder, all_logits: bool = False, **cuda) -> None:
        self.manifest = read_manifest(path)
        self.cuda = FakeCuda(**cuda)
        self.trt = FakeTensorRT(self.cuda, self.manifest.engines[0], decoder, all_logits)
        self.session = TensorRTSession(path, self.manifest, driver=self.cuda, tensorrt=self.trt)
        self.prefills, self.decodes = self.trt.contexts
