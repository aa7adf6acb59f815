"""Export, verify and generate with a tiny random model of every type in headfold.export.exportables.tried, and print one table.

A row passes if it comes true: what should be exported is, proven, and generates what transformers does; what should be refused is, for
the reason that stands there. With --tensorrt the parsed networks are proven too, and one engine of each is built, in float16. With
--weights they are exported rounded, and proven equal to what is rounded; what they generate is then their own.
Exit code 1 if a row does not pass. `scripts/parity_zoo gemma2 phi3` tries these alone.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fakes"))
from random_transformers import random_model, save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.engine.build import build_engine
from headfold.export.engine.network_runner import network_candidate
from headfold.export.engine.options import BuildOptions
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.facts import LayerFacts
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.tried import TRIED, Tried
from headfold.export.parity.compare import Candidate
from headfold.export.parity.verify import verify
from headfold.export.progress import Reporter
from headfold.export.quantization.rounding import WeightRounding
from headfold.plugins.attention.schema import Attention
from headfold.runtime import load
from headfold.runtime.errors import BuildError, HeadfoldError, KernelError
from headfold.runtime.manifest import Manifest, WeightsScheme

PROMPT, NEW = 21, 8  # tokens; the windows that are tried are of 9
QUIET = Reporter(quiet=True)
GPU = (89,)


@dataclass(frozen=True)
class Result:
    """What came of a type: what its layers are, the worst error of logits, what TensorRT made of it, and what does not come true."""

    layers: str = ""
    error: str = ""
    tensorrt: str = ""
    outcome: str = "passes"
    passed: bool = True


def main() -> int:
    """Try what the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensorrt", action="store_true", help="prove TensorRT's networks, and build engines")
    parser.add_argument("--weights", choices=get_args(WeightsScheme), help="round them, whatever it costs")
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [row for row in TRIED if not options.types or row.model_type in options.types]
    table = Table(title=f"{len(rows)} types of transformers' models, random, float32", title_justify="left")
    for column in ("type", "layers", "logits off by", "TensorRT networks", "seconds", ""):
        table.add_column(column)
    rounding = WeightRounding(scheme=options.weights, max_kl=1000) if options.weights else None
    passed = refused = 0
    for row in rows:
        start = time.monotonic()
        try:
            result = attempt(row, rounding, options.tensorrt)
        except Exception as error:
            what = str(error) if isinstance(error, HeadfoldError) else f"{type(error).__name__}: {error}"
            result = Result(outcome=" ".join(what.split())[:300], passed=False)
        seconds = f"{time.monotonic() - start:.0f}"
        table.add_row(row.model_type, result.layers, result.error, result.tensorrt, seconds, result.outcome)
        print(f"{row.model_type}: {dataclasses.astuple(result)}", file=sys.stderr, flush=True)
        passed, refused = passed + result.passed, refused + (result.passed and bool(row.refused))
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    print(f"{passed} of {len(rows)} pass, {refused} of them by being refused")
    return int(passed < len(rows))


def attempt(row: Tried, rounding: WeightRounding | None, tensorrt: bool) -> Result:
    """What comes of one type."""
    with tempfile.TemporaryDirectory() as directory:
        model, bundle = Path(directory) / "model", Path(directory) / "bundle"
        save_random(row.model_type, model)
        try:
            source = open_exportable(model, "transformers")
            result = export_bundle(source, bundle, ExportOptions(decode_steps=NEW, weights=rounding), QUIET)
        except HeadfoldError as error:
            if not row.refused or row.refused not in str(error):
                raise
            return Result(outcome=f"refused: {row.refused}")
        if row.refused:
            return Result(outcome="is exported, and should be refused", passed=False)
        assert result.parity is not None
        prompt = np.random.default_rng(1).integers(3, 300, PROMPT)
        actual = greedy(bundle, prompt)
        if rounding is None and actual != (expected := greedy_in_pytorch(row.model_type, prompt)):
            raise RuntimeError(f"generates {actual} where transformers generates {expected}")
        found = Result(kinds(source.facts.layers), f"{result.parity.summary()['max_logit_error']:.1e}")
        return with_tensorrt(found, row, source, bundle) if tensorrt else found


def kinds(layers: tuple[LayerFacts, ...]) -> str:
    """Of how many kinds its layers are, in words."""

    def kind(layer: LayerFacts) -> str:
        heads = f"{layer.num_attention_heads}/{layer.num_key_value_heads}x{layer.head_dim}"
        return heads + " window" * (layer.window > 0) + " cap" * (layer.softcap > 0) + " sinks" * layer.sinks

    return ", ".join(sorted(set(map(kind, layers))))


def with_tensorrt(found: Result, row: Tried, source: Exportable, bundle: Path) -> Result:
    """Prove the networks of the float32 bundle, whose limits are the tightest; build engines of a float16 one."""
    half = bundle.with_name("half")
    export_bundle(source, half, ExportOptions(dtype="float16", verify=False), QUIET)
    passing, words = [], []
    for attention in get_args(Attention):
        options = BuildOptions(attention=attention, compute_capabilities=GPU)
        try:
            for path in (bundle, half):
                report = verify(path, lambda _: source, NEW, QUIET, partial(network_of, path, options))
                if not report.passed:
                    raise RuntimeError(f"--attention {attention}: {report.failure()}")
            build_engine(half, options, QUIET)
        except (BuildError, KernelError) as error:
            words.append(f"{attention} refused: {error.what}")
        else:
            passing.append(attention)
            words.append(attention)
    if tuple(passing) != row.tensorrt:
        return dataclasses.replace(
            found, tensorrt="; ".join(words), outcome=f"tried.py says {row.tensorrt}", passed=False
        )
    return dataclasses.replace(found, tensorrt="; ".join(words))


def network_of(bundle: Path, options: BuildOptions, manifest: Manifest) -> Candidate:
    """What the engine would be built from."""
    return network_candidate(bundle, manifest, options)


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
