"""Export, verify and generate with a tiny random model of every type in headfold.export.exportables.tried, and print one table.

A row passes, or names the reason; exit code 1 if one does not pass. `scripts/parity_zoo gemma2 phi3` tries these alone.
"""

import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fakes"))
from random_transformers import random_model, save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.tried import TRIED
from headfold.export.progress import Reporter
from headfold.runtime import load
from headfold.runtime.errors import HeadfoldError

PROMPT, NEW = 21, 8  # tokens; the windows that are tried are of 9


def main() -> int:
    """Try what the command line names, or all."""
    logging.disable(logging.WARNING)
    names, failed = sys.argv[1:] or sorted(TRIED), 0
    table = Table(title=f"{len(names)} types of transformers' models, random, float32", title_justify="left")
    for column in ("type", "layers", "logits off by", "greedy tokens", "seconds", ""):
        table.add_column(column)
    for name in names:
        start = time.monotonic()
        try:
            row = attempt(name)
        except HeadfoldError as error:
            failed, row = failed + 1, ["", "", "", str(error)]
        except Exception as error:
            failed, row = failed + 1, ["", "", "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        table.add_row(name, *row[:3], f"{time.monotonic() - start:.0f}", row[3])
        print(f"{name}: {row}", file=sys.stderr, flush=True)
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    print(f"{len(names) - failed} of {len(names)} pass")
    return int(failed > 0)


def attempt(name: str) -> list[str]:
    """Its row of the table."""
    with tempfile.TemporaryDirectory() as directory:
        model, bundle = Path(directory) / "model", Path(directory) / "bundle"
        source = open_exportable(save_random(name, model), "transformers")
        result = export_bundle(source, bundle, ExportOptions(decode_steps=NEW), Reporter(quiet=True))
        assert result.parity is not None
        kinds = sorted(
            {
                ("window" if x.window > 0 else "full") + " cap" * (x.softcap > 0) + " sinks" * x.sinks
                for x in source.facts.layers
            }
        )
        prompt = np.random.default_rng(1).integers(3, 300, PROMPT)
        expected, actual = greedy_in_pytorch(name, prompt), greedy(bundle, prompt)
        if expected != actual:
            raise RuntimeError(f"generates {actual} where transformers generates {expected}")
        return [", ".join(kinds), f"{result.parity.summary()['max_logit_error']:.1e}", f"{NEW} equal", "passes"]


def greedy(bundle: Path, prompt: np.ndarray) -> list[int]:
    """The bundle's own tokens."""
    backend = load(bundle, threads=1).backend
    cache = backend.new_cache(1, len(prompt) + NEW)
    tokens = [int(backend.prefill(cache, 0, prompt).argmax())]
    while len(tokens) < NEW:
        tokens.append(int(backend.decode(cache, np.array(tokens[-1:]), np.ones(1, np.bool_))[0].argmax()))
    return tokens


@torch.inference_mode()
def greedy_in_pytorch(name: str, prompt: np.ndarray) -> list[int]:
    """transformers' tokens, the sequence anew for each."""
    model, tokens = random_model(name), torch.tensor(prompt)
    for _ in range(NEW):
        tokens = torch.cat([tokens, model(tokens[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return tokens[-NEW:].tolist()


if __name__ == "__main__":
    sys.exit(main())
