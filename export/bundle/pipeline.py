"""The main job: a checkpoint becomes a verified bundle. Graph, weights, tokenizer, parity, manifest, then it is published."""

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from pydantic import Field
from torch import Tensor

from headfold.export.bundle.cache_scales import cache_scales, quantization_cost
from headfold.export.bundle.genai import genai_config, genai_refusal
from headfold.export.bundle.writer import (
    check_output,
    file_entry,
    for_the_next,
    manifest_of,
    staged,
    write_file,
    write_json,
)
from headfold.export.checkpoints.opening import load_decoder
from headfold.export.data.calibration import CALIBRATION, MOST_TOKENS, calibration_tokens, write_tokens
from headfold.export.data.calibration import TOKENS as CALIBRATION_TOKENS
from headfold.export.data.token_data import tokenize
from headfold.export.exportables.base import Exportable, Tensors, no_quantized_cache
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedTensors, StoredTensors
from headfold.export.exportables.rounding_record import record_of, record_to_json
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import attach_weights, cache_scales_by_name, save_model
from headfold.export.model.decoder import Scales
from headfold.export.parity.exact.manifest import report_of_weights, tensor_spec
from headfold.export.parity.report import ParityReport
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.gate import MAX_KL, check_max_kl, pass_gate
from headfold.export.quantization.products import round_weights
from headfold.export.quantization.rounding import Prepared, WeightRounding, prepare
from headfold.export.typed import check_types
from headfold.plugins.dtypes import DType, Quantized
from headfold.runtime.choosing.generation_settings import read_generation_settings
from headfold.runtime.errors import BundleError, CheckpointError, ConfigError, VerificationError, located
from headfold.runtime.manifest import (
    FLOAT4_VERSION,
    FLOAT8_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    PARITY,
    QUANTIZED_VERSION,
    RECORD,
    ROADS_VERSION,
    ROUNDED_INPUTS_VERSION,
    ROUNDED_VERSION,
    Manifest,
    QuantizationSpec,
    WeightsScheme,
    cache_spec,
)
from headfold.runtime.text import Text
from headfold.runtime.weight_pages import give_back_freed

_STATUS = Path("/proc/self/status")  # of Linux
_TOOLS = ("headfold", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "onnxruntime", "polygraphy")


@dataclass(frozen=True)
class CacheCalibration:
    """A quantized KV cache, and what its scales are found on."""

    dtype: Quantized
    data: tuple[str, ...] = ()  # sources of text; the model writes its own if there is none
    tokens: int = CALIBRATION_TOKENS
    max_kl: float = MAX_KL  # nats; beside rounded weights theirs, which is of both

    def __post_init__(self) -> None:
        check_types(self)
        check_max_kl(self.max_kl)
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise ConfigError(
                f"is {self.tokens}", where="--calibration-tokens", fix=f"It must be 1 to {MOST_TOKENS:,}."
            )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a bundle should be. `capacity` is in tokens, by default all that the model was made for."""

    dtype: DType = "float32"
    capacity: int | None = None
    all_logits: bool = False
    hidden_states: bool = False  # an output of what the head is given, of every token
    allow_nan: bool = False
    verify: bool = True
    decode_steps: Annotated[int, Field(ge=1)] = 16  # of the comparison
    force: bool = False
    cache: CacheCalibration | None = None  # of a quantized cache; None for one in `dtype`
    weights: WeightRounding | None = None  # None for all of them in `dtype`

    def __post_init__(self) -> None:
        check_types(self)
        if self.weights is None:
            return
        scheme, what = self.weights.scheme, "does not go with weights of four or eight bits"
        if self.allow_nan:
            raise ConfigError(what, where="--allow-nan", fix="Leave it or --weights out.")
        if self.dtype == "bfloat16":  # onnxruntime has no kernel of it, so nobody could say what they cost
            raise ConfigError(what, where="--dtype bfloat16", fix="Use float32 or float16, or leave --weights out.")
        if self.cache is not None and self.cache.dtype != "int8":  # nor of that on CPUs, where it is measured
            fix = "Use int8, or leave --weights out."
            raise ConfigError(what, where=f"--kv-cache {self.cache.dtype}", fix=fix)
        if scheme == "w8a8" and self.dtype != "float32":
            fix = "Use float32, or --weights int8."
            raise ConfigError(
                "does not go with products of integers (--weights w8a8)", where=f"--dtype {self.dtype}", fix=fix
            )


@dataclass(frozen=True)
class ExportResult:
    """A published bundle, and what its making took."""

    output: Path
    manifest: Manifest
    parity: ParityReport | None
    weight_bytes: int
    peak_bytes: int  # resident memory that graph and weights added at their peak; calibration and parity not included


def export_bundle(source: Exportable, output: Path, options: ExportOptions, reporter: Reporter) -> ExportResult:
    """Export a model to a new bundle at `output`.

    Raises:
        HeadfoldError: see the errors of `staged`, `export_graph` and `attach_weights`.
        VerificationError: parity failed, or rounded weights or a quantized cache cost too much; no bundle is published.
    """
    check_output(output, options.force)
    if options.cache is not None and not isinstance(source, OwnModel):
        raise no_quantized_cache(source.path)
    facts, rounding = source.facts, options.weights
    capacity = _capacity(options.capacity, facts.capacity)
    dtype = getattr(torch, options.dtype)
    with for_the_next(output) as unfinished, staged(output, options.force) as stage:
        _write_side_files(stage, source, capacity)  # first: what is wrong with them is known before the work is done
        for data in {part.data for part in (options.cache, rounding) if part is not None and part.data}:
            tokenize(data, source.tokenizer.definition, facts, reporter)  # too; the next time they come from a cache
        scales, quantization = list[Scales](), None
        if options.cache is not None and rounding is None:
            scales, quantization = _calibrate(source, capacity, dtype, options.cache, None, None, reporter, stage)
        give_back_freed()  # from here on what is freed goes back, and no block of a layer's size is kept
        _forget_peak_memory()
        before = psutil.Process().memory_info().rss
        with reporter.step("open the weights"):
            tensors = source.tensors(dtype)
        with reporter.step("trace the graph"):
            stored = options.cache.dtype if options.cache else None
            model = export_graph(source, tensors, dtype, capacity, options.all_logits, stored, options.hidden_states)
        prepared: Prepared | None
        stored_tensors: Tensors
        prepared, stored_tensors, traced = None, tensors, _peak_memory()
        if rounding is not None:
            # What the cache is fitted to must not be what is measured on
            shared = options.cache is not None and bool(rounding.data) and options.cache.data == rounding.data
            more = options.cache.tokens if options.cache is not None and shared else 0
            prepared = prepare(source, tensors, model, capacity, dtype, rounding, reporter, unfinished, more)
            if options.cache is not None:  # of the keys and values that the rounded weights make
                weights, text = prepared.weights, prepared.others if shared else None
                scales, quantization = _calibrate(
                    source, capacity, dtype, options.cache, weights, text, reporter, stage
                )
            give_back_freed()  # hooks hold the model that was run, and it holds them
            _forget_peak_memory()
            round_weights(model, prepared.weights)
            stored_tensors = StoredTensors(prepared.weights)
        tables = {**source.tables(dtype, capacity), **cache_scales_by_name(scales)}
        weight_bytes = attach_weights(model, stored_tensors, tables, options.allow_nan)
        parameters = sum(math.prod(shape) for shape in tensors.shapes().values())
        with reporter.step(f"write {weight_bytes / 2**20:,.0f} MiB of weights", weight_bytes) as advance:
            save_model(model, stage / MODEL, lambda _, size: advance(size))
        inputs, outputs = ([tensor_spec(v) for v in values] for values in (model.graph.inputs, model.graph.outputs))
        del model, tensors, stored_tensors
        peak = max(traced - before, _peak_memory() - before, 0)
        reporter.note(f"peak memory of the export: {peak / 2**20:,.0f} MiB, {peak / weight_bytes:.2f} x the weights")
        fields: dict[str, Any] = {
            "format_version": _format_version(source, quantization, rounding),
            "headfold_version": version("headfold"),
            "source": source.path.name,
            "road": source.road,
            "config": source.describe(),
            "vocab_size": facts.vocab_size,
            "parameters": parameters,
            "dtype": options.dtype,
            "logits": "all" if options.all_logits else "last",
            "inputs": inputs,
            "outputs": outputs,
            "cache": cache_spec(facts.cache_shapes, capacity, quantization),
            "tools": _tools(),
            "weights": prepared.spec if prepared is not None else None,
        }
        with reporter.step("hash"):
            manifest = manifest_of(stage, parity=None, **fields)
        if prepared is not None:
            by_loss = partial(prepared.by_loss, source, capacity)
            spec = pass_gate(stage, manifest, prepared.before, by_loss, reporter)
            write_json(stage / RECORD, record_to_json(record_of(prepared.weights, prepared.costs)))
            files = manifest.files | {name: file_entry(stage / name) for name in (MODEL, RECORD)}
            manifest = manifest.model_copy(update={"files": files, "weights": spec})
            prepared = None  # the logits of a whole text, and weights that GPTQ found
        report = None
        if options.verify:
            report = verify_bundle(stage, source, manifest, options.decode_steps, reporter)
            if not report.finite and not options.allow_nan:
                raise CheckpointError(
                    "its logits are NaN or infinite in PyTorch, too, though all its weights are finite",
                    where=source.path,
                    fix="Training diverged, or a weight is far too large; --allow-nan exports it all the same.",
                )
            if not report.passed:
                raise VerificationError(
                    report.failure(), where=source.path, fix="No bundle was written; --no-verify publishes it anyway."
                )
            write_json(stage / PARITY, report.to_json() | report_of_weights(manifest))
            files = manifest.files | {PARITY: file_entry(stage / PARITY)}
            manifest = manifest.model_copy(update={"files": files, "parity": report.summary()})
        write_json(stage / MANIFEST, manifest.model_dump())
    return ExportResult(output, manifest, report, weight_bytes, peak)


def _calibrate(
    source: Exportable,
    capacity: int,
    dtype: torch.dtype,
    options: CacheCalibration,
    weights: RoundedTensors | None,
    text: Tensor | None,
    reporter: Reporter,
    stage: Path,
) -> tuple[list[Scales], QuantizationSpec]:
    """The cache's scales with these weights, None for the model's own, and what they cost; the decoder is gone afterwards.

    They are found on tokens [N, S] of some text: None for any of `options`.
    """
    assert isinstance(source, OwnModel)
    checkpoint = source.checkpoint
    stored = getattr(torch, options.dtype)
    with reporter.step("read the checkpoint"):
        if weights is None:
            decoder = load_decoder(checkpoint, torch.float32, capacity).eval()
        else:
            decoder = source.reference(dtype, capacity, torch.float32, weights).module
    if text is None:
        definition = checkpoint.tokenizer.definition
        tokens = calibration_tokens(definition, decoder, options.data, options.tokens, reporter=reporter)
    else:
        tokens = text[:: -(-text.numel() // options.tokens)]
    write_file(stage / CALIBRATION, write_tokens(tokens))
    with reporter.step(f"calibrate the {options.dtype} cache"), located(source.path):
        scales = cache_scales(decoder, tokens, stored)
        cost = quantization_cost(decoder, tokens, stored, scales)
    reporter.note(
        f"{options.dtype} cache on {tokens.numel():,} tokens: KL {cost.kl:.2g} nats, same likeliest token {cost.top1:.1%}"
    )
    if not cost.kl <= (options.max_kl if weights is None else math.inf):  # NaN is not
        raise VerificationError(
            f"the {options.dtype} cache costs {cost.kl:.3g} nats, and {options.max_kl:g} are allowed",
            where=source.path,
            fix="Leave --kv-cache out, or allow it with --max-kl. No bundle was written.",
        )
    return scales, QuantizationSpec(dtype=options.dtype, calibration_tokens=tokens.numel(), kl=cost.kl, top1=cost.top1)


def _capacity(asked: int | None, trained: int) -> int:
    if asked is None:
        return trained
    if not 1 <= asked <= trained:
        raise ConfigError(
            f"a capacity of {asked} tokens is outside what the model was made for",
            where="--capacity",
            fix=f"Choose 1 to {trained}.",
        )
    return asked


def _format_version(source: Exportable, quantization: QuantizationSpec | None, rounding: WeightRounding | None) -> int:
    """The oldest one that says what is there, so that old readers open what they can."""
    if rounding is not None:
        newer: dict[WeightsScheme, int] = {
            "w8a8": ROUNDED_INPUTS_VERSION,
            "fp8": FLOAT8_VERSION,
            "nvfp4": FLOAT4_VERSION,
        }
        return newer.get(rounding.scheme, ROUNDED_VERSION)
    if source.road != "headfold" or len(set(source.facts.cache_shapes)) > 1:
        return ROADS_VERSION
    return FORMAT_VERSION if quantization is None else QUANTIZED_VERSION


def _write_side_files(stage: Path, source: Exportable, capacity: int) -> None:
    """Tokenizer and generation settings as they came; settings made from the configuration where none came."""
    for name, content in source.tokenizer.files.items():
        write_file(stage / name, content)
    facts = source.facts
    if "generation_config.json" not in source.tokenizer.files:
        eos = list(facts.eos_token_id)
        ids = {"bos_token_id": facts.bos_token_id, "eos_token_id": eos or None, "pad_token_id": facts.pad_token_id}
        write_json(stage / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    try:
        settings = read_generation_settings(stage)
        Text(stage)
    except BundleError as error:
        file = Path(str(error.where))  # it is about to vanish
        raise CheckpointError(
            error.what,
            where=source.path / file.name if file.parent == stage else source.path,
            fix="Correct it, or take it out of the checkpoint.",
        ) from error
    if genai_refusal(facts) is None:
        write_json(stage / "genai_config.json", genai_config(facts, capacity, settings))


def _tools() -> dict[str, str]:
    """Versions of what made the bundle; of the two onnxruntime packages only one is installed."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def _forget_peak_memory() -> None:
    """Have Linux count the largest resident size anew: what a process did before its export is not the export's."""
    if sys.platform == "linux":
        with suppress(OSError):  # on a hardened system it stays the process's, which is an upper bound
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """The largest resident size in bytes, of Linux since `_forget_peak_memory`, elsewhere of the process so far."""
    with suppress(OSError, StopIteration):  # a sandbox hides it, or leaves this line out
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
