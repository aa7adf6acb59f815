"""Build a TensorRT engine from a bundle's master graph and put it into the bundle, with everything a runtime must know about it.

TensorRT-RTX builds for many GPUs on a machine that has none; full TensorRT builds on the GPU it builds for.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import polygraphy.config
import torch
from polygraphy.exception import PolygraphyException

from headfold.export.bundle.additions import adding
from headfold.export.engine.lowering import lower
from headfold.export.engine.network_report import AttentionLayers, ParsedNetwork, kind, open_flavour, parse, report
from headfold.export.engine.options import BuildOptions, check_options, profiles
from headfold.export.engine.preflight import preflight
from headfold.export.progress import Reporter, quiet_polygraphy
from headfold.export.publishing import one_line, publish_file
from headfold.plugins.attention import kernel_contract, tensorrt_plugin
from headfold.plugins.dtypes import from_tensorrt
from headfold.runtime.errors import BuildError
from headfold.runtime.files.engine_file import check_engine
from headfold.runtime.manifest import (
    ENGINES_VERSION,
    MODEL,
    EngineEntry,
    EngineProfile,
    Manifest,
    PluginEntry,
    TensorSpec,
    check_files,
    read_manifest,
    sha256,
)

ENGINES, KERNELS = "engines", "kernels"  # directories of a bundle


@dataclass(frozen=True)
class BuildResult:
    """A bundle with its new engine."""

    bundle: Path
    entry: EngineEntry
    layers: list[AttentionLayers]
    engine_bytes: int


def build_engine(bundle: Path, options: BuildOptions, reporter: Reporter) -> BuildResult:
    """Build one engine and put it into the bundle, which is replaced as a whole or not at all.

    Raises:
        BundleError: the bundle is damaged.
        BuildError: the options cannot be met, or the graph is none that TensorRT would read rightly.
        HeadfoldError: this flavour of TensorRT is not installed.
    """
    manifest = read_manifest(bundle)
    check_options(options, bundle, manifest)
    with reporter.step("check the bundle's files"):
        check_files(bundle, manifest)
    trt = open_flavour(options.target)
    with reporter.step("lower and parse the graph"):
        lowered, parsed = lowered_network(trt, bundle, manifest, options)
        layers = report(parsed, options.attention, manifest.cache.num_hidden_layers)
    file = f"{ENGINES}/{options.target}-{options.attention}.engine"

    def update(current: Manifest) -> Manifest:
        check_options(options, bundle, current)
        return _with_engine(current, manifest, entry, bundle)

    with adding(bundle, update, KERNELS if options.attention == "plugin" else None) as stage:
        plugin = _add_kernels(stage, manifest, options, lowered, reporter) if options.attention == "plugin" else None
        with reporter.step("build the engine"):
            engine = _serialize(parsed, manifest, options, reporter)
        (stage / ENGINES).mkdir(exist_ok=True)
        (stage / file).write_bytes(engine)
        entry = _entry(parsed, manifest, options, file, layers, plugin)
        check_engine(stage, entry)
    return BuildResult(bundle, entry, layers, len(engine))


def lowered_network(
    trt: Any, bundle: Path, manifest: Manifest, options: BuildOptions
) -> tuple[ir.Model, ParsedNetwork]:
    """The bundle's graph lowered, past preflight, and parsed. Raises BuildError."""
    path = bundle / MODEL
    model = lower(path, options.attention, options.settle(manifest)[1])
    preflight(model, options.attention, path)
    parsed = parse(trt, model, path)
    for layer in parsed.layers():
        if (
            kind(layer) == "ATTENTION_INPUT"
        ):  # may be several kernels: in float32, with few query heads or large ones there is no fused one
            layer.attention.decomposable = True
    return model, parsed


def _serialize(parsed: ParsedNetwork, manifest: Manifest, options: BuildOptions, reporter: Reporter) -> memoryview:
    """Build, through polygraphy's loaders."""
    rtx = options.target == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != polygraphy.config.USE_TENSORRT_RTX:
        raise BuildError(
            "polygraphy serves one flavour of TensorRT per process, and has the other one already",
            where=f"--target {options.target}",
            fix="Build the two flavours with two commands.",
        )
    polygraphy.config.USE_TENSORRT_RTX = rtx  # read when its TensorRT backend is imported, so before
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network

    trt = parsed.trt
    common: dict[str, Any] = {
        "profiles": [_polygraphy_profile(Profile(), profile) for profile in profiles(options, manifest)],
        "progress_monitor": _monitor(trt, reporter),
        "weight_streaming": options.weight_streaming,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if options.timing_cache is not None and options.timing_cache.is_file():
        common["load_timing_cache"] = str(options.timing_cache)
    if options.workspace is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace}
    if options.attention == "plugin":
        common["preview_features"] = [trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03]
    if rtx:
        pairs = [divmod(sm, 10) for sm in sorted(options.compute_capabilities)]
        config = CreateConfigRTX(compute_capabilities=pairs, **common)
    else:
        config = CreateConfig(**common)
    network = (parsed.builder, parsed.network, parsed.parser)
    engines: list[Any] = []

    def build(timings: Path | None) -> None:
        cache = str(timings) if timings is not None else None
        engines.append(engine_bytes_from_network(network, config, save_timing_cache=cache))

    try:
        with quiet_polygraphy():
            if options.timing_cache is not None:
                with one_line(BuildError, options.timing_cache, "Name another file with --timing-cache."):
                    publish_file(options.timing_cache, build)
            else:
                build(None)
    except PolygraphyException as error:
        raise BuildError(
            f"TensorRT builds no engine: {parsed.logger.last_error()}",
            where=f"--target {options.target}",
            fix="--workspace or another --capacity may help; please report it otherwise.",
        ) from error
    return memoryview(engines[0])


def _polygraphy_profile(empty: Any, profile: EngineProfile) -> Any:
    for name, shapes in profile.shapes.items():
        empty.add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
    return empty


def _monitor(trt: Any, reporter: Reporter) -> Any:
    """TensorRT's progress: a step per phase that is part of no other."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is Any
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[ExitStack, Any]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None and not self.phases:
                stack = ExitStack()
                self.phases[phase] = stack, stack.enter_context(reporter.step(f"TensorRT: {phase}", steps))

        def step_complete(self, phase: str, _: int) -> bool:
            if phase in self.phases:
                self.phases[phase][1](1)
            return True

        def phase_finish(self, phase: str) -> None:
            if phase in self.phases:
                self.phases.pop(phase)[0].close()

    return Monitor()


def _entry(
    parsed: ParsedNetwork,
    manifest: Manifest,
    options: BuildOptions,
    file: str,
    layers: list[AttentionLayers],
    plugin: PluginEntry | None,
) -> EngineEntry:
    network = parsed.network
    max_input, capacity = options.settle(manifest)
    totals: dict[str, int] = {}
    for layer in layers:
        for name, count in layer.layers.items():
            totals[name] = totals.get(name, 0) + count
    return EngineEntry(
        file=file,
        flavour=options.target,
        version=parsed.trt.__version__,
        attention=options.attention,
        dtype=manifest.dtype,
        compute_capabilities=_capabilities(options),
        max_batch=options.max_batch,
        max_input=max_input,
        capacity=capacity,
        weight_streaming=options.weight_streaming,
        profiles=profiles(options, manifest),
        inputs=[_spec(network.get_input(i), manifest.inputs) for i in range(network.num_inputs)],
        outputs=[_spec(network.get_output(i), manifest.outputs) for i in range(network.num_outputs)],
        aliases={output: source for layer in layers for output, source in layer.aliased.items()},
        plugin=plugin,
        layers=totals,
        tools={name: version(name) for name in ("headfold", "onnx", "onnx-ir", "polygraphy")},
    )


def _capabilities(options: BuildOptions) -> list[int]:
    """The GPUs that an engine is for: those asked for, or with full TensorRT the one that is here."""
    if options.target == "tensorrt-rtx":
        return sorted(options.compute_capabilities)
    major, minor = torch.cuda.get_device_capability()
    return [10 * major + minor]


def _spec(tensor: Any, master: list[TensorSpec]) -> TensorSpec:
    """A tensor of the network; dynamic dimensions have the master's names."""
    names = next(spec.shape for spec in master if spec.name == tensor.name)
    shape = [name if dim < 0 else dim for dim, name in zip(tensor.shape, names, strict=True)]
    return TensorSpec(name=tensor.name, dtype=from_tensorrt(tensor.dtype), shape=shape)


def _add_kernels(
    stage: Path, manifest: Manifest, options: BuildOptions, lowered: ir.Model, reporter: Reporter
) -> PluginEntry:
    """Compile the plugin's kernels into the staged bundle."""
    from headfold.export.engine.kernels import compile_spec, kernel_spec

    directory = stage / KERNELS
    others = (entry for entry in manifest.engines if entry.plugin is not None and entry.flavour != options.target)
    capabilities = {*_capabilities(options), *(sm for entry in others for sm in entry.compute_capabilities)}
    compile_spec(kernel_spec(lowered), sorted(capabilities), directory, reporter)
    return PluginEntry(
        name=tensorrt_plugin.NAME,
        version=tensorrt_plugin.PLUGIN_VERSION,
        namespace=tensorrt_plugin.NAMESPACE,
        kernels=KERNELS,
        kernels_sha256=sha256(directory / kernel_contract.MANIFEST),
    )


def _with_engine(current: Manifest, built_from: Manifest, entry: EngineEntry, bundle: Path) -> Manifest:
    """The bundle's manifest as it is now with the new engine; another build may have added its own meanwhile, and keeps it.

    Raises:
        BuildError: the bundle is another one than the engine was built from, or has got an engine whose kernels would be lost.
    """
    if current.files.get(MODEL) != built_from.files[MODEL]:
        raise BuildError("was replaced while its engine was built", where=bundle, fix="Build again.")
    engines = [e for e in current.engines if e.file != entry.file]
    if entry.plugin is not None:  # one set of kernels serves all engines of a bundle
        known = {e.file for e in built_from.engines}
        if any(e.plugin is not None and e.file not in known for e in engines):
            raise BuildError("got another engine with kernels of its own meanwhile", where=bundle, fix="Build again.")
        engines = [e.model_copy(update={"plugin": entry.plugin}) if e.plugin is not None else e for e in engines]
    version = max(ENGINES_VERSION, current.format_version)
    return current.model_copy(update={"format_version": version, "engines": [*engines, entry]})
