"""Memory of a mixture of experts on the CPU: a random qwen3_moe of 64 experts, 8 chosen, prefills 512 tokens in a fresh process.

Called by `scripts/bench.py --experts`. What counts is the peak of that process beyond one that has the runtime loaded and no model.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS, LIMIT = 512, 1.5  # of the prompt; times the weights, issue 12


def bundle(path: Path) -> Path:
    """The exported model, made at the first call: 8 layers, 256 wide, experts of 3 x 256 x 128, 207 MB of weights."""
    if not path.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from headfold.export.bundle.pipeline import ExportOptions, export_bundle
        from headfold.export.exportables.opening import open_exportable
        from headfold.export.progress import Reporter

        path.parent.mkdir(parents=True, exist_ok=True)
        source = path.with_name(f"{path.name}-hf")
        shutil.rmtree(source, ignore_errors=True)
        config = AutoConfig.for_model(
            "qwen3_moe",
            vocab_size=1024,
            hidden_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=64,
            num_experts_per_tok=8,
            max_position_embeddings=1024,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        export_bundle(open_exportable(source), path, ExportOptions(verify=False), Reporter(quiet=True))
        shutil.rmtree(source)
    return path


def peak_bytes() -> int:
    """The largest resident size so far: of this program alone, where `resource` would count its parent's, from before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def worker(path: str, threads: int) -> None:
    """In a process of its own: prefill, then print what it took; without a path only what is imported."""
    import numpy as np
    import onnxruntime  # noqa: F401  # what a session imports

    from headfold.runtime import load

    figures: dict[str, Any] = {}
    if path:
        backend = load(path, threads=threads).backend
        cache = backend.new_cache(1, TOKENS + 1)
        figures["loaded"] = peak_bytes()
        start = time.perf_counter()
        backend.prefill(cache, 0, np.random.default_rng(0).integers(0, 1024, TOKENS))
        figures["seconds"] = time.perf_counter() - start
    print(json.dumps(figures | {"peak": peak_bytes()}))


def experts(folder: Path, threads: int) -> dict[str, Any]:
    """Measure, print and return the figures."""
    path = bundle(folder / "experts")
    weights = (path / "model.onnx.data").stat().st_size

    def peak(bundle: str) -> dict[str, Any]:
        command = [sys.executable, __file__, bundle, str(threads)]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    empty, full = peak(""), peak(str(path))
    ratio = (full["peak"] - empty["peak"]) / weights
    print(f"64 experts, 8 chosen, {weights / 2**20:,.0f} MiB of weights, float32, {threads} threads, {TOKENS} tokens:")
    print(f"loaded {(full['loaded'] - empty['peak']) / 2**20:,.0f} MiB, prefilled {full['seconds']:.2f} s,")
    print(f"peak {(full['peak'] - empty['peak']) / 2**20:,.0f} MiB: {ratio:.2f} x the weights (at most {LIMIT})")
    return {"weights": weights, "empty": empty, "full": full, "ratio": ratio}


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
