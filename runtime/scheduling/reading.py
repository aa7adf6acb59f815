"""A bundle that reads prompts for another one of the same model, into the cache that the other decodes from.

Weights of eight bits with rounded inputs read several times as fast as those of four, which decode faster: each where it is best,
at the memory of both. A cache in eight bits, which decodes faster and is read into slower, is filled from one in floats.
Engine-independent, as the scheduler is; the cache must be in this process's memory.
"""

from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from headfold.plugins.dtypes import QUANTIZED
from headfold.runtime.backend import AnyCache, Backend
from headfold.runtime.errors import InputError
from headfold.runtime.files.graph_file import cache_scales
from headfold.runtime.manifest import MODEL, Manifest

_SAMPLE = 8  # tokens of which both compute the first layer's keys and values
_MOST = 0.5  # of their relative error: four bits make some 0.1, other weights 1.4
_FIX = "Give one that was exported from the same checkpoint, with the same --dtype and --capacity."


def check_reader(bundle: Path, manifest: Manifest, path: Path, reader: Manifest) -> None:
    """Raise InputError if, as far as manifests tell, the bundle at `path` cannot read prompts for the other one."""
    if reader.cache.quantization is not None:
        raise InputError(
            "reads prompts into a quantized cache, whose scales are its own",
            where=path,
            fix="Export it without --kv-cache: the bundle that decodes may have one.",
        )
    for name in ("road", "dtype", "vocab_size"):
        _check_same(name, getattr(manifest, name), getattr(reader, name), bundle, path)
    for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
        _check_same(name, getattr(manifest.cache, name), getattr(reader.cache, name), bundle, path)
    for name in sorted({*manifest.config, *reader.config}):
        _check_same(name, manifest.config.get(name), reader.config.get(name), bundle, path)
    if reader.cache.capacity < manifest.cache.capacity:
        shorter = (
            f"has a capacity of {reader.cache.capacity} tokens, less than the {manifest.cache.capacity} of {bundle}"
        )
        raise InputError(shorter, where=path, fix=_FIX)


def _check_same(name: str, own: Any, others: Any, bundle: Path, path: Path) -> None:
    if own != others:
        raise InputError(
            f"its {name} is {others}, that of {bundle} {own}: it is of another model", where=path, fix=_FIX
        )


class ReadByAnother(Generic[AnyCache]):
    """A backend whose prompts another one computes; all else, logits of all tokens among it, is its own. See Backend.

    Raises:
        InputError: they compute other keys and values, so have other weights.
        BundleError: its cache is quantized, and the graph does not say how.
    """

    def __init__(
        self, own: Backend[AnyCache], reader: Backend[AnyCache], manifest: Manifest, bundle: Path, path: Path
    ) -> None:
        """`manifest` is that of the own `bundle`, `path` where the reader's is."""
        self._own, self._reader = own, reader
        self._scales: list[NDArray[np.float32]] | None = None  # [Hkv, 1, 1] of each array of the own cache
        if manifest.cache.quantization is not None:
            pairs = cache_scales(bundle / MODEL, [heads for heads, _ in manifest.cache.shapes])
            self._scales = [scales[:, None, None] for pair in pairs for scales in pair]
        ids = np.linspace(0, manifest.vocab_size - 1, min(_SAMPLE, manifest.cache.capacity)).astype(np.int64)
        one, other = _first_layer(own, ids, self._scales), _first_layer(reader, ids)
        for mine, its in zip(one, other, strict=True):
            if not np.linalg.norm(its - mine) <= _MOST * np.linalg.norm(mine):  # nor if one is not a number
                raise InputError(
                    "computes other keys and values: its weights are of another model", where=path, fix=_FIX
                )

    @property
    def session(self) -> Any:
        """Its own."""
        return self._own.session

    @property
    def gives_all_logits(self) -> bool:
        """See Backend."""
        return self._own.gives_all_logits

    @property
    def gives_hidden_states(self) -> bool:
        """See Backend."""
        return self._own.gives_hidden_states

    def largest_cache(self, rows: int) -> tuple[int, int]:
        """See Backend."""
        return self._own.largest_cache(rows)

    def new_cache(self, batch: int, capacity: int) -> AnyCache:
        """See Backend."""
        return self._own.new_cache(batch, capacity)

    def prefill(
        self, cache: AnyCache, row: int, ids: NDArray[np.int64], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """See Backend. Guesses that are checked and tokens that are scored need all logits, and are not prompts."""
        if all_logits or self._scales is None:
            return (self._own if all_logits else self._reader).prefill(cache, row, ids, all_logits)
        return self._round_what_is_read(cache, row, ids, self._scales)

    def _round_what_is_read(
        self, cache: AnyCache, row: int, ids: NDArray[np.int64], scales: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The same into a cache of int8: the reader computes in floats behind what the row holds; what is new is then rounded."""
        floats, start = self._reader.new_cache(1, cache.capacity), int(cache.lengths[row])
        assert cache.host is not None  # as below
        assert floats.host is not None
        floats.host.write(0, (part * scale for part, scale in zip(cache.host.read(row, start), scales, strict=True)))
        floats.lengths[0] = start
        logits = self._reader.prefill(floats, 0, ids)
        end, (least, most) = start + len(ids), QUANTIZED["int8"]
        read = floats.host.read(0, end)
        for part, made, scale in zip(cache.host.read(row, end), read, scales, strict=True):
            part[:, start:] = np.clip(np.rint(made[:, start:] / scale), least, most)
        cache.lengths[row] = end
        return logits

    def hidden_states(self, cache: AnyCache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Backend."""
        return self._own.hidden_states(cache, row, ids)

    def decode(self, cache: AnyCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend."""
        return self._own.decode(cache, tokens, active)


def _first_layer(
    backend: Backend[Any], ids: NDArray[np.int64], scales: list[NDArray[np.float32]] | None = None
) -> list[NDArray[np.float64]]:
    """Keys and values, [Hkv, T, D] each, of tokens [T]; `scales` if they are quantized."""
    cache = backend.new_cache(1, len(ids))
    backend.prefill(cache, 0, ids)
    assert cache.host is not None  # `load` refuses GPUs
    parts = [array.astype(np.float64) for array in cache.host.read(0, len(ids))[:2]]
    return parts if scales is None else [part * scale for part, scale in zip(parts, scales, strict=False)]
