"""Memory and time of exporting a model too large for the memory of small machines: a random llama, in shards of bfloat16.

Peaks are of the exporting process. Anonymous memory is what it cannot do without. Mapped are pages of files, through which weights
are read and checked: the system takes them back whenever it wants, and lets them stand while nobody else asks for memory. Shards are
kept; bundles are not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SIZES = {  # by billions of parameters: hidden, intermediate, layers, heads, key/value heads of 128
    "0.5": (1536, 4096, 16, 12, 4),
    "1": (2048, 5632, 22, 16, 4),
    "3": (3072, 8192, 28, 24, 8),
}
VOCABULARY, CAPACITY, HEAD = 32000, 4096, 128


@dataclass(frozen=True)
class Peak:
    """Of a process, in bytes, and what it was doing."""

    anonymous: int
    mapped: int
    seconds: float
    code: int


def make(directory: Path, size: str) -> None:
    """The checkpoint, a shard for every two layers and one for the rest, unless it is there."""
    if (directory / "config.json").is_file():
        return
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    directory.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    shards = [shapes | {"model.norm.weight": (hidden,)}]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (heads * HEAD, hidden),
            "self_attn.k_proj": (kv_heads * HEAD, hidden),
            "self_attn.v_proj": (kv_heads * HEAD, hidden),
            "self_attn.o_proj": (hidden, heads * HEAD),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        named = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
        shards[-1 if layer % 2 else len(shards) :] = [named if layer % 2 == 0 else shards[-1] | named]
    generator, places = torch.Generator().manual_seed(0), dict[str, str]()
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
            for name, shape in shard.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}  # transformers wants both
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD,
        "max_position_embeddings": CAPACITY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def measure(command: list[str]) -> Peak:
    """Run it, looking at its memory ten times a second (Linux)."""
    start, anonymous, mapped, told = time.perf_counter(), 0, 0, 0
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):  # it has just ended
            break
        if "RssAnon" in lines:
            now = int(lines["RssAnon"].split()[0]) << 10
            if now > told + (64 << 20):
                print(f"  {time.perf_counter() - start:6.0f} s: {now >> 20:,} MiB", file=sys.stderr)
                told = now
            anonymous, mapped = max(anonymous, now), max(mapped, int(lines["RssFile"].split()[0]) << 10)
        time.sleep(0.1)
    return Peak(anonymous, mapped, time.perf_counter() - start, process.wait())


def copying(source: Path, target: Path) -> float:
    """Seconds that a copy of the checkpoint takes until it is on the disk; it is deleted."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", choices=SIZES, default="0.5", help="billions")
    parser.add_argument("--directory", type=Path, default=Path("models/big"), help="of shards and bundles")
    parser.add_argument("options", nargs="*", help="of headfold export, after --: --weights int8 ...")
    options = parser.parse_args()
    source, bundle = options.directory / f"llama-{options.parameters}b", options.directory / "bundle"
    make(source, options.parameters)
    shutil.rmtree(bundle, ignore_errors=True)
    command = [sys.executable, "-m", "headfold.export", "export", str(source), "-o", str(bundle), *options.options]
    if "--weights" in options.options:  # random, too: text that the model writes takes a pass a token
        np.save(options.directory / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, 20_000))
        command += ["--data", str(options.directory / "tokens.npy")]
    copied = copying(source, bundle)
    peak = measure(command)
    written = sum(path.stat().st_size for path in bundle.iterdir()) if bundle.is_dir() else 0
    shutil.rmtree(bundle, ignore_errors=True)
    print(
        f"{options.parameters} B {' '.join(options.options)}: code {peak.code}, {peak.seconds:,.0f} s (copying takes {copied:,.0f}), "
        f"bundle {written >> 20:,} MiB, peaks {peak.anonymous >> 20:,} MiB anonymous, {peak.mapped >> 20:,} MiB mapped"
    )
    return peak.code


if __name__ == "__main__":
    sys.exit(main())
