"""What `headfold inspect` tells of a checkpoint or a bundle: facts as plain JSON types, and a table of them.

A bundle's are told without torch: on machines that only serve, and at once, however large it is.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headfold.export.exportables.facts import Facts as ModelFacts
from headfold.export.exportables.facts import LayerFacts
from headfold.export.exportables.tried import TRIED
from headfold.export.model.config import ModelConfig
from headfold.plugins.dtypes import DTYPES
from headfold.runtime.errors import BundleError, printable
from headfold.runtime.files.engine_file import check_engine
from headfold.runtime.files.json_file import RECORD_BYTES, read_object
from headfold.runtime.manifest import MANIFEST, MODEL, RECORD, EngineEntry, WeightsSpec, check_sizes, read_manifest

if TYPE_CHECKING:
    from headfold.export.exportables.base import Exportable

Facts = dict[str, Any]
_LONGEST = 4000  # characters of one fact
_WIDTHS = {  # of rounded weights, but of integers in blocks
    7: "seven bits with a scale for each output, inputs in eight",
    "float8": "float8_e4m3fn with a scale for each output",
    "float4": "float4_e2m1 in blocks of 16, kept in a byte each",
}


def inspect_path(path: Path) -> Facts:
    """Facts of the bundle or checkpoint at `path`; sizes are in bytes. A bundle's files are there and as large as its
    manifest says; their hashes are for those who run it.

    Raises:
        HeadfoldError: it is neither, or it is damaged.
    """
    if (path / MANIFEST).exists():
        return _bundle(path)
    from headfold.export.exportables.opening import open_exportable  # here, for it imports torch

    return inspect_checkpoint(open_exportable(path))


def inspect_checkpoint(exportable: "Exportable") -> Facts:
    """The same of a checkpoint that is open."""
    from headfold.export.exportables.own import OwnModel

    facts: Facts = {"kind": "checkpoint", "path": str(exportable.path), "road": exportable.road, **exportable.titles}
    if not isinstance(exportable, OwnModel):
        return facts | _attention(exportable.facts, 4) | {"tokenizer": sorted(exportable.tokenizer.files)}
    checkpoint = exportable.checkpoint
    shapes = checkpoint.shapes()
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    dtypes = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in shapes})
    size = sum(count * checkpoint.dtype(name).itemsize for name, count in counts.items())
    cache_itemsize = min(checkpoint.dtype(name).itemsize for name in shapes)
    facts |= _architecture(checkpoint.config, cache_itemsize)
    tokenizer = sorted(checkpoint.tokenizer.files)
    return facts | {
        "parameters": sum(counts.values()),
        "dtype": ", ".join(dtypes),
        "weight_bytes": size,
        "ignored_tensors": list(checkpoint.ignored),
        "tokenizer": tokenizer,
    }


def _bundle(path: Path) -> Facts:
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    for engine in manifest.engines:
        check_engine(path, engine)
    itemsize, cache_itemsize = (DTYPES[name].size for name in (manifest.dtype, manifest.cache_dtype))
    spec = manifest.weights
    facts: Facts = {"kind": "bundle", "path": str(path), "source": manifest.source, "road": manifest.road}
    if manifest.road == "headfold":
        facts |= _architecture(ModelConfig.from_json(manifest.config), cache_itemsize)
    else:
        facts |= _attention(ModelFacts.from_json(manifest.config), cache_itemsize)
    return facts | {
        "parameters": manifest.parameters,
        "dtype": manifest.dtype,
        "cache_dtype": manifest.cache_dtype,
        "weights": _weights(spec, path / RECORD) if spec else None,
        "weights_cost": spec.cost.model_dump() if spec and spec.cost else None,
        "weight_bytes": manifest.files[f"{MODEL}.data"].size if spec else manifest.parameters * itemsize,
        "bundle_bytes": sum(entry.size for entry in manifest.files.values()),
        "capacity": manifest.cache.capacity,
        "logits": manifest.logits,
        "hidden_states": manifest.hidden_size is not None,
        "targets": ["onnxruntime", *map(_engine, manifest.engines)],
        "parity": manifest.parity,
        "tools": manifest.tools,
    }


def _weights(spec: WeightsSpec, record: Path) -> str:
    """What each rounded weight has become, as `record` says; the others are floats."""
    fix = "Export the bundle again."
    try:
        tensors = read_object(record, RECORD_BYTES, BundleError, fix)["tensors"].values()
        kinds = Counter((tensor["bits"], tensor["block_size"]) for tensor in tensors)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise BundleError("is no record of rounded weights", where=record, fix=fix) from error
    each = [
        f"{count} in {_WIDTHS.get(bits, f'{bits} bits in blocks of {block}')}" for (bits, block), count in kinds.items()
    ]
    kept = f"; {spec.kept} kept as they were quantized" if spec.kept else ""
    return (
        f"{spec.scheme}, {spec.bits:.3g} bits; tensors: {', '.join(each)}; accuracy level {spec.accuracy_level}{kept}"
    )


def _engine(engine: EngineEntry) -> str:
    gpus = ", ".join(map(str, engine.compute_capabilities))
    sizes = f"batch {engine.max_batch}, input {engine.max_input}, capacity {engine.capacity}"
    return f"{engine.flavour} {engine.version}, {engine.attention} attention, SM {gpus}, {sizes}"


def _architecture(config: ModelConfig, itemsize: int) -> Facts:
    """Sizes in tokens, heads and bytes; a token's cache is keys and values of all layers (Ainslie et al. 2023, section 1)."""
    window = f", window {config.sliding_window} in {len(config.sliding_layers)} layers" if config.sliding_layers else ""
    return {
        "model_type": config.model_type,
        "attention": f"{config.attention}{window}",
        "feed_forward": config.feed_forward,
        "norm": config.norm,
        "rope": f"{config.rope.rope_type}, theta {config.rope.rope_theta:g}",
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "kv_bytes_per_token": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize,
    }


def _attention(facts: ModelFacts, itemsize: int) -> Facts:
    """The same of a model that headfold has no table of; where layers differ, each kind once, with its number of layers."""
    kinds = Counter(facts.layers)

    def each(text: Callable[[LayerFacts], str]) -> str:
        found = Counter[str]()
        for layer, count in kinds.items():
            found[text(layer)] += count
        return (
            next(iter(found)) if len(found) == 1 else ", ".join(f"{value} in {n} layers" for value, n in found.items())
        )

    return {
        "model_type": facts.model_type,
        "attention": each(_how),
        "num_hidden_layers": len(facts.layers),
        "hidden_size": facts.hidden_size,
        "num_attention_heads": each(lambda x: str(x.num_attention_heads)),
        "num_key_value_heads": each(lambda x: str(x.num_key_value_heads)),
        "head_dim": each(lambda x: str(x.head_dim)),
        "vocab_size": facts.vocab_size,
        "max_position_embeddings": facts.capacity,
        "kv_bytes_per_token": 2 * itemsize * sum(heads * head_dim for heads, head_dim in facts.cache_shapes),
    }


def _how(layer: LayerFacts) -> str:
    extras = ["soft cap"] * (layer.softcap > 0) + ["sinks"] * layer.sinks
    return ", ".join([f"window {layer.window}" if layer.window > 0 else "full", *extras])


def render(facts: Facts) -> None:
    """Print the facts as a table of two columns on standard output; bytes are also given in MiB. No text is taken for markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        if value is None:
            text = "none"
        elif name.endswith("_bytes"):
            text = f"{value:,} ({value / 2**20:,.1f} MiB)"
        elif isinstance(value, dict):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(str, value)) or "none"
        else:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(name.replace("_", " "), Text(printable(text, _LONGEST)))
    Console(highlight=False).print(table)


def render_targets(targets: Sequence[Facts]) -> None:
    """Print what a checkpoint can become as a table on standard output, a row for each, with how, or why not."""
    table = Table("can become", "", "", box=None, pad_edge=False)
    for target in targets:
        table.add_row(target["name"], "yes" if target["possible"] else "no", Text(printable(target["note"], _LONGEST)))
    Console(highlight=False).print(table)


def render_families() -> None:
    """Print what tests try as a table on standard output, a row for each model type."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model type", no_wrap=True, min_width=max(len(row.model_type) for row in TRIED))
    for name in ("road", "random model", "real weights", "TensorRT network"):
        table.add_column(name, overflow="fold")
    for row in sorted(TRIED, key=lambda row: row.model_type):
        table.add_row(row.model_type, row.road, row.refused or "proven", row.real, ", ".join(row.tensorrt))
    Console(highlight=False).print(table)
