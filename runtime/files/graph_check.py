"""A bundle's manifest, held to what its graph says of its inputs and outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from headfold.plugins.dtypes import DTYPES
from headfold.plugins.names import HIDDEN_STATES
from headfold.runtime.errors import BundleError
from headfold.runtime.files.graph_file import check_capacity
from headfold.runtime.manifest import Manifest

_AGAIN = "Export it again."


class Port(Protocol):
    """An input or output, as an onnxruntime.InferenceSession tells of it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def type(self) -> str:
        """As "tensor(float)"."""

    @property
    def shape(self) -> Sequence[Any]:
        """A number is a fixed size."""


def check_graph(inputs: Sequence[Port], outputs: Sequence[Port], path: Path, manifest: Manifest) -> None:
    """Hold what the manifest says of the graph at `path` to the graph itself, before any memory is taken by it.

    Raises:
        BundleError: it says something else.
    """
    for kind, values in (("inputs", inputs), ("outputs", outputs)):
        if [value.name for value in values] != [spec.name for spec in getattr(manifest, kind)]:
            raise BundleError(f"its {kind} are not those of the manifest", where=path, fix=_AGAIN)
    cache = manifest.cache
    facts = {"logits": (manifest.dtype, {2: manifest.vocab_size})} | {
        name: (manifest.cache_dtype, {1: heads, 3: head_dim})
        for names, (heads, head_dim) in cache.tensors.items()
        for name in names
    }
    if manifest.hidden_size is not None:
        facts[HIDDEN_STATES] = (manifest.dtype, {2: manifest.hidden_size})
    graph = {value.name: value for value in (*inputs, *outputs)}
    for name, (dtype, sizes) in facts.items():
        value = graph.get(name)
        kind = f"tensor({DTYPES[dtype].onnxruntime})"
        if value is None or value.type != kind or any(value.shape[axis : axis + 1] != [n] for axis, n in sizes.items()):
            found = "there is none" if value is None else f"it is a {value.type} {value.shape}"
            wanted = ", ".join(f"{size} on axis {axis}" for axis, size in sizes.items())
            raise BundleError(f"{name} is not the manifest's {kind} with {wanted}: {found}", where=path, fix=_AGAIN)
    if (graph["logits"].shape[1] == 1) != (manifest.logits == "last"):
        raise BundleError(
            f"its logits are not those of {manifest.logits} tokens, as its manifest says", where=path, fix=_AGAIN
        )
    check_capacity(path, cache.capacity)
