"""Compile the attention kernels a model needs, for GPUs that are not there, into a directory with a kernels.json.

Four kernels per compute capability serve all layers. Code is cached by the hash of everything it depends on, so only what changed is
compiled; `headfold.plugins.attention.kernel_contract` says what the files hold.
"""

import base64
import hashlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
from pydantic import BaseModel, Field, ValidationError

from headfold.export.graph.passes import attention_nodes, columns
from headfold.export.progress import Reporter
from headfold.export.publishing import publish_file, sweep
from headfold.plugins.attention import kernel_contract, tensorrt_plugin
from headfold.plugins.attention.kernel_contract import (
    GRIDS,
    MANIFEST,
    PARAMETERS,
    SCRATCH,
    KernelEntry,
    KernelManifest,
    KernelName,
    KernelSpec,
    Parameter,
    constants,
    parameters,
    tiles,
)
from headfold.plugins.attention.schema import NORMS
from headfold.plugins.dtypes import DTYPES, QUANTIZED
from headfold.plugins.gpus import FLOAT8_SINCE, GPUS
from headfold.runtime.cpu import physical_cores
from headfold.runtime.errors import KernelError

_SOURCE = Path(kernel_contract.__file__).with_name("triton_kernels.py")  # which is not imported here: that needs Triton
_NATIVE = "Use --attention native for this model."
_PTX_SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}


class _Job(NamedTuple):
    kernel: KernelName
    capability: int
    key: str  # of the cache


class _Facts(BaseModel, extra="forbid"):
    """What a compiler said of a kernel, beside its code."""

    entry: str
    num_warps: int = Field(ge=1)
    shared_bytes: int = Field(ge=0)
    scratch_bytes: int = Field(ge=0)
    registers: int = Field(ge=0)
    stack_bytes: int = Field(ge=0)


class _Known(BaseModel, extra="forbid"):
    """What the cache says of a kernel."""

    facts: _Facts
    sha256: str


class _Code(NamedTuple):
    cubin: bytes
    facts: dict[str, Any]


def kernel_spec(model: ir.Model) -> KernelSpec:
    """The kernels that every attention of a graph lowered for the plugin needs.

    Raises:
        KernelError: there are none for such heads, or layers need different ones.
    """
    nodes = attention_nodes(model)
    first, *others = [_node_spec(node) for node in nodes]
    for node, spec in zip(nodes[1:], others, strict=True):
        if spec != first:
            what = tensorrt_plugin.differences(spec, first)
            raise KernelError(f"needs other kernels than the first layer: {what}", where=node.name, fix=_NATIVE)
    return first


def _node_spec(node: ir.Node) -> KernelSpec:
    cache = node.inputs[tensorrt_plugin.ALIASES[1]]
    assert cache is not None
    stored = _dtype(cache)
    names = tensorrt_plugin.input_names(len(node.inputs), stored in QUANTIZED)
    assert names is not None
    given = dict(zip(names, node.inputs, strict=True))
    attributes = node.attributes
    try:
        return KernelSpec.model_validate(
            {
                "num_heads": attributes["num_heads"].as_int(),
                "kv_num_heads": attributes["kv_num_heads"].as_int(),
                "head_dim": columns(cache),
                "rotary_dim": 2 * columns(given["cos_cache"]),
                "rotary_interleaved": bool(attributes.get_int("rotary_interleaved", 0)),
                "qk_norm": set(NORMS) <= set(names),
                "softcap": attributes.get_float("softcap", 0.0),
                "dtype": _dtype(given["cos_cache"]),
                "cache_dtype": stored,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise KernelError(
            f"{field}: {first['msg']}" if field else first["msg"], where=node.name, fix=_NATIVE
        ) from error


def _dtype(value: ir.Value | None) -> str:
    assert value is not None
    return next(name for name, names in DTYPES.items() if names.onnx == value.dtype)


def compile_spec(
    spec: KernelSpec,
    capabilities: Sequence[int],
    directory: Path,
    reporter: Reporter | None = None,
    cache: Path | None = None,
) -> KernelManifest:
    """Write a model's kernels and their kernels.json into `directory`, which is created.

    Args:
        spec: from `kernel_spec`.
        capabilities: compute capabilities, 86 for 8.6; see `headfold.plugins.gpus`.
        directory: where to write, e.g. BUNDLE/kernels.
        reporter: shows the progress.
        cache: where compiled code is kept; by default `$XDG_CACHE_HOME/headfold/kernels`.

    Raises:
        KernelError: an unknown capability, a cache dtype without kernels, or no Triton.
    """
    _check(spec, capabilities)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headfold" / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    source, triton = hashlib.sha256(_SOURCE.read_bytes()).hexdigest(), version("triton")
    jobs = [
        _Job(kernel, capability, _key(spec, kernel, capability, source, triton))
        for capability in sorted(set(capabilities))
        for kernel in PARAMETERS
    ]
    code = {job: found for job in jobs if (found := _cached(cache, job.key)) is not None}
    missing = [job for job in jobs if job not in code]
    with (reporter or Reporter(quiet=True)).step("compiling kernels", len(missing)) as advance:
        for job, made in _compiled(spec, missing):
            _keep(cache, job.key, made)
            code[job] = made
            advance(1)
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for job in jobs:
        entry = _entry(spec, job, code[job])
        (directory / entry.file).write_bytes(code[job].cubin)
        entries.append(entry)
    manifest = KernelManifest(spec=spec, triton=triton, source_sha256=source, kernels=entries)
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def check_signature(ptx: str, entry: str, expected: Sequence[Parameter]) -> None:
    """Compare a compiled entry's parameters with what the launcher passes: `expected`, then Triton's two scratch pointers.

    Raises:
        KernelError: another number of them, or one of another size.
    """
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)", ptx, re.DOTALL)
    if found is None:
        raise KernelError(f"the compiled code has no entry {entry!r}", fix="Install the Triton that headfold pins.")
    sizes = [_PTX_SIZES.get(kind, 0) for kind in re.findall(r"\.param\s+\.(\w+)", found[1])]
    names = [parameter.name for parameter in expected] + list(SCRATCH)
    wanted = [parameter.size for parameter in expected] + [8] * len(SCRATCH)
    for index in range(max(len(sizes), len(wanted))):
        have = f"{sizes[index]} bytes" if index < len(sizes) else "nothing"
        want = f"{wanted[index]} bytes for {names[index]}" if index < len(wanted) else "nothing"
        if have.split()[0] != want.split()[0]:
            raise KernelError(
                f"parameter {index} of the compiled code takes {have}, the launcher passes {want}",
                where=entry,
                fix="Install the Triton that headfold pins.",
            )


def _check(spec: KernelSpec, capabilities: Sequence[int]) -> None:
    known = ", ".join(map(str, GPUS))
    if not capabilities:
        raise KernelError("no compute capability is given", fix=f"There are kernels for {known}.")
    for capability in capabilities:
        if capability not in GPUS:
            raise KernelError(
                f"there are no kernels for compute capability {capability}", fix=f"There are for {known}."
            )
        if spec.cache_dtype == "float8_e4m3fn" and capability < FLOAT8_SINCE:
            raise KernelError(
                f"compute capability {capability} has no float8_e4m3fn",
                fix=f"Use an int8 cache, or only capabilities from {FLOAT8_SINCE} on.",
            )
    if importlib.util.find_spec("triton") is None:
        raise KernelError("Triton is not installed", fix="pip install 'headfold[tensorrt-rtx]'")


def _key(spec: KernelSpec, kernel: KernelName, capability: int, source: str, triton: str) -> str:
    """The hash of everything that a kernel's code depends on."""
    sizes = tiles(spec, kernel, capability)
    types = [parameter.type for parameter in parameters(spec, kernel)]
    content = [
        kernel,
        capability,
        source,
        triton,
        types,
        constants(spec, kernel, capability),
        sizes.num_warps,
        sizes.num_stages,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cached(cache: Path, key: str) -> _Code | None:
    """What an earlier call compiled; None too if it is damaged."""
    facts, cubin = cache / f"{key}.json", cache / f"{key}.cubin"
    if not (facts.is_file() and cubin.is_file()):
        return None
    try:
        content, known = cubin.read_bytes(), _Known.model_validate_json(facts.read_bytes())
    except ValidationError:
        return None
    return _Code(content, known.facts.model_dump()) if hashlib.sha256(content).hexdigest() == known.sha256 else None


def _keep(cache: Path, key: str, code: _Code) -> None:
    """The cubin first: without its JSON it does not count."""
    known = {"facts": code.facts, "sha256": hashlib.sha256(code.cubin).hexdigest()}
    for suffix, content in (("cubin", code.cubin), ("json", json.dumps(known).encode())):
        publish_file(cache / f"{key}.{suffix}", partial(Path.write_bytes, data=content))


def _entry(spec: KernelSpec, job: _Job, code: _Code) -> KernelEntry:
    facts = dict(code.facts)
    name = f"{job.kernel} for compute capability {job.capability}"
    if facts.pop("scratch_bytes"):
        raise KernelError("needs scratch memory, which the launcher does not give", where=name)
    if facts["shared_bytes"] > GPUS[job.capability].shared_kib << 10:
        raise KernelError(
            f"needs {facts['shared_bytes']} bytes of shared memory, over the {GPUS[job.capability].shared_kib} KiB there are",
            where=name,
            fix="Use --attention native for this model.",
        )
    return KernelEntry(
        kernel=job.kernel,
        capability=job.capability,
        file=f"{job.kernel}.sm_{job.capability}.cubin",
        sha256=hashlib.sha256(code.cubin).hexdigest(),
        parameters=parameters(spec, job.kernel),
        grid=GRIDS[job.kernel],
        tile=tiles(spec, job.kernel, job.capability).rows,
        **facts,
    )


def _compiled(spec: KernelSpec, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, _Code]]:
    """Compile in as many processes as there are cores; the slow ones, prefill on Turing first, begin first."""
    if not jobs:
        return
    order = sorted(jobs, key=lambda job: (job.kernel != "prefill", job.kernel != "decode", job.capability))
    count = min(physical_cores(), len(jobs))
    with tempfile.TemporaryDirectory(prefix="headfold-triton-") as scratch, ThreadPoolExecutor(count) as pool:
        idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

        def compile_one(job: _Job) -> _Code:
            worker = idle.get()
            try:
                return _ask(worker, spec, job)
            finally:
                idle.put(worker)

        with _workers(count, Path(scratch)) as workers:
            for worker in workers:
                idle.put(worker)
            futures = [pool.submit(compile_one, job) for job in order]
            try:
                for job, future in zip(order, futures, strict=True):
                    yield job, future.result()
            finally:
                for future in futures:
                    future.cancel()


def _ask(worker: "subprocess.Popen[str]", spec: KernelSpec, job: _Job) -> _Code:
    assert worker.stdin is not None
    assert worker.stdout is not None
    where = f"{job.kernel} for compute capability {job.capability}"
    try:
        print(
            json.dumps({"spec": spec.model_dump(), "kernel": job.kernel, "capability": job.capability}),
            file=worker.stdin,
            flush=True,
        )
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise KernelError(
            "Triton's compiler crashed", where=where, fix="Install the Triton that headfold pins; please report it."
        )
    reply = json.loads(line)
    if "error" in reply:
        raise KernelError(f"Triton cannot compile it: {reply['error']}", where=where)
    return _Code(base64.b64decode(reply["cubin"]), reply["facts"])


@contextmanager
def _workers(count: int, scratch: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes of `kernel_worker`, with Triton's settings that make code reproducible; they end with the block."""
    settings = {
        "TRITON_CACHE_DIR": str(scratch),  # ours is the cache
        "TRITON_DISABLE_LINE_INFO": "1",  # paths of source files would get into the code
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "headfold.export.engine.kernel_worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen(command, env=kept | settings, text=True, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
