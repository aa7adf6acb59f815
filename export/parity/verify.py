"""Whole bundles against whole models: what `headfold export` and `headfold verify` call."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from headfold.export.data.calibration import CALIBRATION, read_tokens
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.oracle import Oracle
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedCheckpoint, RoundedTensors, StoredTensors
from headfold.export.exportables.rounding_record import RoundingRecord, read_record
from headfold.export.graph.bodies import levels
from headfold.export.graph.experts import experts_nodes
from headfold.export.graph.recipes import lacks_recipes
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import load_model
from headfold.export.parity.compare import Candidate, Subject, verify_graph
from headfold.export.parity.exact.experts import prove_experts
from headfold.export.parity.exact.manifest import check_against_graph, check_parameters
from headfold.export.parity.exact.rounding import (
    StoredRoundings,
    prove_described,
    prove_kept,
    prove_recorded,
    prove_rounding,
    rounded_in,
)
from headfold.export.parity.exact.weights import (
    prove_attributes,
    prove_rotations,
    prove_scales,
    prove_tables,
    prove_weights,
    stored_cache,
    table_names,
)
from headfold.export.parity.probes import make_prompts
from headfold.export.parity.report import CheckResult, ParityReport
from headfold.export.parity.tolerances import Precision
from headfold.export.progress import Reporter
from headfold.plugins.attention.schema import SCALES, TABLES
from headfold.plugins.names import scale_name
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import MODEL, RECORD, Manifest, check_files, read_manifest

_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well "
    "fixed in the minds of the surrounding families, that he is considered the rightful property of some one or other of their "
    "daughters."
)
_AGAIN = "Export it again."
_PROMPT = 48  # tokens of the longest prompt


def verify(
    bundle: Path,
    open_: Callable[[Manifest], Exportable],
    decode_steps: int,
    reporter: Reporter,
    candidate: Callable[[Manifest], Candidate] | None = None,
) -> ParityReport:
    """Compare a finished bundle with what it should have come from, which `open_` opens, told by the manifest how.

    `candidate` makes what is compared from the checked manifest; by default the bundle's graph in ONNX Runtime.

    Raises:
        BundleError: the bundle is damaged or too old to be proven, or its configuration is not that of the source.
    """
    manifest = read_manifest(bundle)
    with reporter.step("check the bundle's files"):
        check_files(bundle, manifest)
        model = load_model(bundle / MODEL)
        if lacks_recipes(model):
            raise BundleError(
                "was exported by an older headfold, whose file does not say how its weights were made",
                where=bundle,
                fix="Export it again.",
            )
        check_against_graph(bundle, manifest, model)
        del model
    exportable = open_(manifest)
    found = exportable.describe()
    if found != manifest.config:
        differing = [name for name, x in found.items() if manifest.config.get(name) != x]
        raise BundleError(
            f"was made from another model than {exportable.path}: {', '.join(differing)} differ",
            where=bundle,
            fix="Name its checkpoint.",
        )
    chosen = candidate(manifest) if candidate is not None else None
    return verify_bundle(bundle, exportable, manifest, decode_steps, reporter, chosen)


def verify_bundle(
    directory: Path,
    exportable: Exportable,
    manifest: Manifest,
    decode_steps: int,
    reporter: Reporter,
    candidate: Candidate | None = None,
) -> ParityReport:
    """Prove a bundle, finished or staged: its weights, tables and attributes as they stand in the file, then its arithmetic.

    `candidate` runs by default the bundle's graph in ONNX Runtime.
    """
    facts, capacity, stored = exportable.facts, manifest.cache.capacity, getattr(torch, manifest.dtype)
    own = exportable.checkpoint.config if isinstance(exportable, OwnModel) else None
    quantization, cache = manifest.cache.quantization, None
    model = load_model(directory / MODEL)
    spec, rounded, record = manifest.weights, None, RoundingRecord({})
    if spec is not None:
        rounded, record = _rounded(directory, exportable, model, stored)
    if quantization is not None:
        cache = stored_cache(model, quantization.dtype, len(facts.layers))
    with reporter.step("compare the weights"):
        scales = [scale_name(layer, part) for layer in range(len(facts.layers)) for part in SCALES] if cache else []
        weights = rounded if rounded is not None else exportable.tensors(stored)
        check_parameters(directory, manifest, weights.shapes())
        tensors = StoredTensors(rounded) if rounded is not None else weights
        checks = [prove_weights(model, tensors, stored, TABLES if own is not None else table_names(model), scales)]
        if own is not None:
            checks.append(prove_tables(model, own, capacity, stored))
        else:
            again = export_graph(exportable, exportable.tensors(stored), stored, capacity)
            checks.append(prove_rotations(model, again))
            if experts_nodes(model) or experts_nodes(again):
                checks.append(prove_experts(model, again))
            del again
        del weights, tensors
        checks.append(prove_attributes(model, facts, own))
        if spec is not None and rounded is not None:
            checks.append(prove_described(spec, rounded, levels(model)))
            checks.append(prove_rounding(rounded, record.tensors))
            checks.append(prove_recorded(rounded, record.tensors))
            checks += [prove_kept(rounded)] if isinstance(rounded, RoundedCheckpoint) and rounded.kept else []
    del model

    def also(oracle: Oracle) -> Iterator[CheckResult]:
        yield from checks
        if cache is not None:
            yield prove_scales(
                oracle, read_tokens(directory / CALIBRATION, facts.vocab_size, capacity), cache, manifest.dtype
            )

    subject = Subject(
        path=directory / MODEL,
        facts=facts,
        precision=precision_of(manifest),
        all_logits=manifest.logits == "all",
        capacity=capacity,
        cache=cache,
        oracle=lambda: exportable.oracle(stored, capacity, rounded),  # what rounding costs is for the gate
        reference=lambda arithmetic: exportable.reference(stored, capacity, arithmetic, rounded),
        hidden_states=manifest.hidden_size is not None and candidate is None,  # engines have none
    )
    tokenizer = directory / "tokenizer.json"
    text = Tokenizer.from_file(str(tokenizer)).encode(_TEXT).ids if tokenizer.is_file() else None
    room = capacity - decode_steps - 1
    prompts = make_prompts(facts.vocab_size, min(_PROMPT, max(room, 1)), text)
    steps = min(decode_steps, capacity - max(map(len, prompts)) - 1)
    return verify_graph(subject, prompts, steps, reporter, candidate, also)


def _rounded(
    directory: Path, exportable: Exportable, model: ir.Model, stored: torch.dtype
) -> tuple[RoundedTensors, RoundingRecord]:
    """The weights as the bundle rounds it: by the rule, or to the numbers that stand in the graph where no rule finds them."""
    own = exportable.checkpoint if isinstance(exportable, OwnModel) else None
    weights = exportable.tensors(stored)
    record = read_record(directory / RECORD, weights.shapes(), own.config if own is not None else None)
    if unnamed := sorted((rounded_in(model) & weights.shapes().keys()) - record.tensors.keys()):
        raise BundleError(f"says nothing of {unnamed[0]}, which is rounded", where=directory / RECORD, fix=_AGAIN)
    by_gptq, by_rule, kept = (
        {name: weight.form for name, weight in record.tensors.items() if weight.method == method}
        for method in ("gptq", "nearest", "kept")
    )
    forms, found = by_rule | by_gptq, StoredRoundings(model, by_gptq, weights.shapes(), directory / MODEL)
    if own is not None:
        return RoundedCheckpoint(record.smoothed(own), forms, found, kept, stored), record
    if kept:
        raise BundleError("keeps a checkpoint's own bits, of a model of another road", where=directory, fix=_AGAIN)
    return RoundedTensors(weights, forms, found, stored), record


def reference_of(directory: Path, exportable: Exportable, manifest: Manifest, arithmetic: torch.dtype) -> Oracle:
    """The model in PyTorch with the weights that a bundle of it has, rounded where they are."""
    stored, rounded = getattr(torch, manifest.dtype), None
    if manifest.weights is not None:
        rounded, _ = _rounded(directory, exportable, load_model(directory / MODEL), stored)
    return exportable.reference(stored, manifest.cache.capacity, arithmetic, rounded)


def precision_of(manifest: Manifest) -> Precision:
    """How a bundle's graph computes in ONNX Runtime."""
    quantization = manifest.cache.quantization
    stored = quantization.dtype if quantization is not None else None
    return Precision("onnxruntime", manifest.dtype, stored, rounded=manifest.weights is not None)
