"""Whole bundles against whole checkpoints: what `headfold export` and `headfold verify` call."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from headfold.export.exportables.base import Exportable, Oracle, QuantizedCache
from headfold.export.model.decoder import Scales
from headfold.export.parity.compare import Candidate, make_prompts, verify_graph
from headfold.export.parity.report import ParityReport
from headfold.export.parity.tolerances import Precision
from headfold.export.progress import Reporter
from headfold.plugins.schema import SCALES
from headfold.runtime.errors import BundleError
from headfold.runtime.graph_file import check_capacity
from headfold.runtime.manifest import MODEL, Manifest, check_files, read_manifest

_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well "
    "fixed in the minds of the surrounding families, that he is considered the rightful property of some one or other of their "
    "daughters."
)
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
        BundleError: the bundle is damaged, or its configuration is not that of the source.
    """
    manifest = read_manifest(bundle)
    with reporter.step("check the bundle's files"):
        check_files(bundle, manifest)
        check_capacity(bundle / MODEL, manifest.cache.capacity)
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
    """Compare a bundle, finished or staged, with the oracle of what it was made from; see `verify_graph`.

    `candidate` is by default the bundle's graph in ONNX Runtime.
    """
    stored, capacity = getattr(torch, manifest.dtype), manifest.cache.capacity
    cache = None
    if manifest.cache.quantization is not None:
        scales = stored_scales(directory / MODEL, manifest.cache.num_hidden_layers)
        cache = QuantizedCache(manifest.cache.quantization.dtype, scales)

    def load(arithmetic: torch.dtype) -> Oracle:
        return exportable.oracle(stored, capacity, arithmetic, cache)  # rounded like the bundle

    tokenizer = directory / "tokenizer.json"
    text = Tokenizer.from_file(str(tokenizer)).encode(_TEXT).ids if tokenizer.is_file() else None
    room = capacity - decode_steps - 1
    prompts = make_prompts(exportable.facts.vocab_size, min(_PROMPT, max(room, 1)), text)
    return verify_graph(
        directory / MODEL,
        load,
        exportable.facts.vocab_size,
        precision_of(manifest),
        manifest.logits == "all",
        prompts,
        min(decode_steps, capacity - max(map(len, prompts)) - 1),
        reporter,
        candidate,
    )


def precision_of(manifest: Manifest) -> Precision:
    """How a bundle's graph computes in ONNX Runtime."""
    quantization = manifest.cache.quantization
    return Precision("onnxruntime", manifest.dtype, quantization.dtype if quantization is not None else None)


def stored_scales(path: Path, num_hidden_layers: int) -> list[Scales]:
    """The scales of a graph's quantized cache, of each layer."""
    values = ir.load(path).graph.initializers

    def read(layer: int, name: str) -> torch.Tensor:
        tensor = values[f"model.layers.{layer}.self_attn.{name}"].const_value
        assert tensor is not None
        return torch.tensor(tensor.numpy())

    return [(read(layer, SCALES[0]), read(layer, SCALES[1])) for layer in range(num_hidden_layers)]
