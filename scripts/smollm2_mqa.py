#!/usr/bin/env python3
"""SmolLM2-135M-Instruct from three key/value heads to one: convert, uptrain a little with a teacher, export, verify, generate.

Perplexity on held-out text before the conversion, after it and after the uptraining, for svd and for the paper's mean. What is done
already is not done again.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.data.token_data import TokenData, tokenize
from headfold.export.progress import Reporter
from headfold.export.training.evaluation import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from corpus import corpus

ROOT = Path(__file__).resolve().parents[1]
GGUF = Path(os.environ.get("HEADFOLD_SMOLLM2", ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
WORK = ROOT / "bundles" / "smollm2-mqa"
PROMPT = "The capital of France is"


def headfold(*arguments: object, text: bool = False) -> str:
    """Run a command; its standard output if it is wanted."""
    command = [sys.executable, "-m", "headfold.export", *map(str, arguments)]
    print("$ headfold", *arguments, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE if text else None, text=True).stdout or ""


def perplexity(path: Path, data: TokenData, sequences: int) -> float:
    loss = evaluate(load_decoder(open_checkpoint(path), capacity=512), data, 256, sequences, batch=4)
    return math.exp(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens, to evaluate on")
    parser.add_argument("--inits", nargs="+", default=["svd", "mean"])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    WORK.mkdir(parents=True, exist_ok=True)
    text, held_out, about = corpus(ROOT / "models" / "corpus")
    source = open_checkpoint(GGUF)
    sample = WORK / "validation.txt"  # a little of it: the command evaluates before and after
    sample.write_text(held_out.read_text()[:16384])
    validation = tokenize([str(held_out)], source.tokenizer.definition, source.config, Reporter(quiet=True))
    file = WORK / "perplexity.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"text": about}

    def note(name: str, path: Path) -> None:
        if name not in figures:
            figures[name] = perplexity(path, validation, options.sequences)
            file.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"perplexity, {name}: {figures[name]:.2f}", flush=True)

    note("original, 3 key/value heads", GGUF)
    students = {init: (WORK / f"{init}-converted", WORK / f"{init}-uptrained") for init in options.inits}
    for init, (converted, _) in students.items():
        if not converted.exists():
            arguments = ("--calibration-tokens", options.calibration_tokens, "--data", text)
            headfold("convert", GGUF, "-o", converted, "--kv-heads", 1, "--init", init, *arguments)
        note(f"{init}, converted to 1", converted)
    for init, (converted, uptrained) in students.items():
        if not uptrained.exists():
            tokens = options.steps * options.batch * options.sequence
            size = ("--tokens", tokens, "--batch", options.batch, "--sequence", options.sequence)
            rate = ("--learning-rate", options.learning_rate, "--checkpoint-every", 10, "--keep", 1)
            how = ("--teacher", GGUF, "--loss", "kl", "--data", text, "--validation", sample, "--resume", "--cpu")
            headfold("uptrain", converted, "-o", uptrained, *how, *size, *rate)
            figures[f"{init}, steps"] = options.steps
            figures[f"{init}, tokens"] = tokens
        note(f"{init}, uptrained", uptrained)
    init, (_, uptrained) = next(iter(students.items()))
    bundle = WORK / f"{init}-bundle"
    if not bundle.exists():
        headfold("export", uptrained, "-o", bundle, "--capacity", 512, "--decode-steps", 4)
    headfold("verify", bundle, "--against", uptrained, "--decode-steps", 4)
    figures[f"{init}, generated"] = headfold("generate", bundle, PROMPT, "-n", 24, "--temperature", 0, text=True)
    file.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"> {PROMPT}{figures[f'{init}, generated']}")


if __name__ == "__main__":
    main()
