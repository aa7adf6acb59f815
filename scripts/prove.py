#!/usr/bin/env python3
"""The proof, tested: every fault in every family and format must be caught, and sixty odd but honest models must not be refused.

Without --all, one format of each family and ten models. Exit code 1 if anything comes out otherwise. Run it as `scripts/prove`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fakes"))

from proof_cases import FAMILIES, FAULTS, FORMATS, applies, caught, export, honest_model, prove, random_weights  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every family in every format, and sixty models")
    everything = parser.parse_args().all
    start = time.perf_counter()
    wrong = [*planted(everything), *refused(60 if everything else 10)]
    print(f"{len(wrong)} came out wrong, in {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def planted(everything: bool) -> Iterator[str]:
    """Faults that were missed."""
    formats = list(FORMATS)
    for number, (family, config) in enumerate(FAMILIES.items()):
        for kind in formats if everything else [formats[number % len(formats)]]:
            with tempfile.TemporaryDirectory() as directory:
                bundle = export(Path(directory), config, random_weights(config), FORMATS[kind])
                faults = [name for name in FAULTS if applies(name, family, kind)]
                found = {name: caught(bundle, FAULTS[name], Path(directory) / f"{i}") for i, name in enumerate(faults)}
            missed = [name for name, what in found.items() if what is None]
            print(f"{family}, {kind}: {len(found) - len(missed)} of {len(found)} faults caught", *missed, flush=True)
            yield from missed


def refused(count: int) -> Iterator[str]:
    """Honest models that were refused."""
    for seed in range(count):
        with tempfile.TemporaryDirectory() as directory:
            config, weights, options = honest_model(seed)
            report = prove(export(Path(directory), config, weights, options))
        worst = max(report.checks, key=lambda check: check.max_error / check.limit if check.limit else 0.0)
        share = worst.max_error / worst.limit
        print(f"honest model {seed}, {config.model_type}: {share:.0%} of what is allowed in {worst.name}", flush=True)
        if not report.passed:
            print(f"  REFUSED: it {report.failure()}", flush=True)
            yield f"model {seed}"


if __name__ == "__main__":
    sys.exit(main())
