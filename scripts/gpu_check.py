#!/usr/bin/env python3
"""What cannot be known without a GPU: the `gpu` tests, parity of ONNX Runtime CUDA and of TensorRT's engines, and all their speeds.

Run it as `scripts/gpu_check`, which makes the environment. Writes one report, JSON, named after the machine and its GPU; exit code 1 if
a test or a comparison failed, 2 where there is no GPU. What could not be built or opened is in the report with its reason.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, get_args

from gpu_kernels import time_kernels
from gpu_types import TypeCheck, check_types

from headfold.export.quantization.rounding import WeightRounding
from headfold.plugins.dtypes import DType
from headfold.runtime.backend import Backend
from headfold.runtime.errors import HeadfoldError, ProviderError
from headfold.runtime.manifest import WeightsScheme

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bundles" / "gpu_check"
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CAPACITY = 2048
BATCHES = (1, 32)  # sequences that are decoded together, each after a prompt of its own
PACKAGES = ("cuda-bindings", "headfold", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "triton")
Open = Callable[[], Backend[Any]]


class Case(NamedTuple):
    """A bundle of SmolLM2: its dtype, and its weights' scheme where they are rounded."""

    dtype: DType
    weights: WeightsScheme | None = None

    @property
    def name(self) -> str:
        """The bundle's."""
        return f"{self.dtype}-{self.weights}" if self.weights else self.dtype


ENGINES = Case("float16")  # what engines are built of
CASES = (
    ENGINES,
    Case("bfloat16"),
    Case("float32"),
    # mixed weights are of two others' kernels
    *(Case("float16", weights=scheme) for scheme in get_args(WeightsScheme) if scheme != "mixed"),
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    arguments.add_argument("--new", type=int, default=128, help="tokens that are decoded after it")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    try:
        machine = describe()
    except ProviderError as error:
        print(f"gpu_check: {error.what}: nothing was run", file=sys.stderr)
        return 2
    print(f"{machine['name']}: {machine['gpu']}, compute capability {machine['compute_capability']}", flush=True)
    report: dict[str, Any] = {"machine": machine, "tests": run_tests()}
    print("tests:", report["tests"], flush=True)
    found, report["unavailable"] = prepare(machine["compute_capability"])
    report["parity"] = compare(found)
    for check in report["parity"]:
        verdict = "ok" if check["passed"] else "FAILED"
        print(f"{verdict:6} {check['backend']}, {check['name']}: {check['max_error']:.3g} of {check['limit']:.3g}")
    report["timing"] = [measure(found, batch, options.prompt, options.new, options.rounds) for batch in BATCHES]
    for timing in report["timing"]:
        for name, times in timing["backends"].items():
            speeds = f"prefill {times['prefill_tokens_per_s']:.0f}, decode {times['decode_tokens_per_s']:.1f} tokens/s"
            print(f"{name}, {timing['batch']} sequences: {speeds}", flush=True)
    report["kernels"] = [asdict(timing) for timing in time_kernels()]
    report["types"] = []
    for type_ in check_types():
        report["types"].append(asdict(type_))
        verdict = "none" if type_.missing else "ok" if type_.passed else "FAILED"
        print(f"{verdict:6} {type_.model_type}: {type_.missing or shares(type_)}", flush=True)
    path = WORK / f"{machine['name']}-{machine['gpu'].replace(' ', '_')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")
    checks = report["parity"] + [check for type_ in report["types"] for check in type_["checks"]]
    passed = report["tests"]["failed"] == 0 and all(check["passed"] for check in checks)
    return 0 if passed and report["parity"] else 1


def shares(found: TypeCheck) -> str:
    """How much of what is allowed each of a type's checks took, and near-ties."""
    ties = sum(check.near_ties for check in found.checks)
    words = [f"{check.name} {check.max_error / check.limit:.2f}" for check in found.checks]
    return ", ".join(words + [f"{ties} near-ties"] * bool(ties))


def describe() -> dict[str, Any]:
    """The machine, its first GPU and the versions that matter. Raises ProviderError without a GPU."""
    from headfold.runtime.device import Device

    device = Device()
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "name": platform.node(),
        "gpu": device.call("cuDeviceGetName", 256, device.call("cuDeviceGet", 0)).split(b"\0")[0].decode(),
        "compute_capability": device.capability,
        "cuda_driver": device.call("cuDriverGetVersion"),
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }


def run_tests() -> dict[str, Any]:
    """`pytest -m gpu`, with the names of what failed or was skipped."""
    WORK.mkdir(parents=True, exist_ok=True)
    results = WORK / "tests.xml"
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={results}", *files], cwd=ROOT)
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    ran = len(cases) - len(skipped)
    return {"ran": ran, "failed": len(failed), "failures": failed, "skipped": skipped}


def prepare(capability: int) -> tuple[dict[Case, dict[str, Open]], dict[str, str]]:
    """The bundles, and all engines that can be built for this GPU: what opens each backend, and why others are not there."""
    from headfold.runtime.manifest import read_manifest
    from headfold.runtime.session import OrtSession

    def open_cuda(bundle: Path) -> Backend[Any]:
        return OrtSession(bundle, read_manifest(bundle), "cuda")

    found: dict[Case, dict[str, Open]] = {}
    missing: dict[str, str] = {}
    for case in CASES:
        try:
            bundle = export(case)
        except HeadfoldError as error:
            missing[case.name] = str(error)
            continue
        found[case] = {f"cuda {case.name}": partial(open_cuda, bundle)}
        if case == ENGINES:
            found[case] |= build(bundle, capability, missing)
        for name, open_backend in list(found[case].items()):
            try:
                open_backend()
            except HeadfoldError as error:
                del found[case][name]
                missing[name] = str(error)
    for name, reason in missing.items():
        print(f"not there: {name}: {reason}", flush=True)
    return found, missing


def export(case: Case) -> Path:
    """The case's bundle, made anew and not yet verified: that is `compare`."""
    from headfold.export.bundle.pipeline import ExportOptions, export_bundle
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.progress import Reporter

    bundle = WORK / case.name
    options = ExportOptions(
        dtype=case.dtype,
        capacity=CAPACITY,
        verify=False,
        force=True,
        weights=rounding(case.weights) if case.weights else None,
    )
    export_bundle(open_exportable(GGUF), bundle, options, Reporter())
    return bundle


def rounding(scheme: WeightsScheme) -> WeightRounding:
    """What is quick, whatever it costs: a GPU is asked whether its kernels agree."""
    return WeightRounding(scheme=scheme, method="nearest", max_kl=10.0, data=(str(ROOT / "README.md"),))


def build(bundle: Path, capability: int, missing: dict[str, str]) -> dict[str, Open]:
    """What opens each engine of a bundle; why one is not built goes into `missing`."""
    from headfold.export.engine.build import build_engine
    from headfold.export.engine.options import BuildOptions
    from headfold.export.progress import Reporter
    from headfold.runtime.manifest import read_manifest
    from headfold.runtime.tensorrt_session import TensorRTSession

    def open_engine(file: str) -> Backend[Any]:
        manifest = read_manifest(bundle)
        entries = [entry for entry in manifest.engines if entry.file == file]
        return TensorRTSession(bundle, manifest.model_copy(update={"engines": entries}))

    found: dict[str, Open] = {}
    for flavour in ("tensorrt-rtx", "tensorrt"):
        for attention in ("native", "plugin"):
            name = f"{flavour}-{attention}"
            sm = (capability,) if flavour == "tensorrt-rtx" else ()
            options = BuildOptions(target=flavour, attention=attention, compute_capabilities=sm)
            try:
                build_engine(bundle, options, Reporter())
            except HeadfoldError as error:
                missing[name] = str(error)
                continue
            found[name] = partial(open_engine, f"engines/{name}.engine")
    return found


def compare(found: dict[Case, dict[str, Open]]) -> list[dict[str, Any]]:
    """Every backend's logits against PyTorch on the CPU, through polygraphy's runners."""
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.parity.backends import verify_backends
    from headfold.export.parity.probes import make_prompts
    from headfold.export.parity.verify import precision_of, reference_of
    from headfold.runtime.manifest import read_manifest

    checks = []
    source = open_exportable(GGUF)
    prompts = make_prompts(source.facts.vocab_size, 48, None)
    for case, backends in found.items():
        bundle = WORK / case.name
        manifest = read_manifest(bundle)

        oracle = partial(reference_of, bundle, source, manifest)
        checks += verify_backends(oracle, backends, precision_of(manifest), prompts, decode_steps=32)
    return [vars(check) for check in checks]


def measure(found: dict[Case, dict[str, Open]], batch: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of a batch, greedy: medians of interleaved rounds, after one that does not count."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, 49152, (batch, prompt))
    opened = {name: open_() for backends in found.values() for name, open_ in backends.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for _ in range(rounds + 1):
        for name, backend in opened.items():
            cache = backend.new_cache(batch, prompt + new)
            start = time.perf_counter()
            tokens = np.array([backend.prefill(cache, row, ids[row]).argmax() for row in range(batch)])
            middle = time.perf_counter()
            for _ in range(new - 1):
                tokens = backend.decode(cache, tokens, np.ones(batch, np.bool_)).argmax(axis=-1)
            seconds[name].append((middle - start, time.perf_counter() - middle))
    result = {}
    for name, times in seconds.items():
        prefill, decode = (statistics.median(column) for column in zip(*times[1:], strict=True))
        result[name] = {
            "prefill_tokens_per_s": batch * prompt / prefill,
            "decode_tokens_per_s": batch * (new - 1) / decode,
        }
    return {"prompt": prompt, "new": new, "rounds": rounds, "batch": batch, "backends": result}


if __name__ == "__main__":
    sys.exit(main())
