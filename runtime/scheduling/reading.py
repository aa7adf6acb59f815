"""A bundle that reads prompts for another one of the same model, into the cache that the other decodes from.

Weights of eight bits with rounded inputs read several times as fast as those of four, which decode faster: each where it is best,
at the memory of both. Engine-independent, as the scheduler is; the cache must be in this process's memory.
"""

from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from headfold.runtime.backend import AnyCache, Backend
from headfold.runtime.errors import InputError
from headfold.runtime.manifest import Manifest

_SAMPLE = 8  # tokens of which both compute the first layer's keys and values
_MOST = 0.5  # of their relative error: four bits make some 0.1, other weights 1.4
_FIX = "Give one that was exported from the same checkpoint, with the same --dtype and --capacity."


def check_reader(bundle: Path, manifest: Manifest, path: Path, reader: Manifest) -> None:
    """Raise InputError if, as far as manifests tell, the bundle at `path` cannot read prompts for the other one."""
    for where, one in ((bundle, manifest), (path, reader)):
        if one.cache.quantization is not None:
            raise InputError(
                "another bundle cannot write its quantized cache, whose scales are its own",
                where=where,
                fix="Export it without --kv-cache, or leave the bundle for prompts out.",
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
    """

    def __init__(self, own: Backend[AnyCache], reader: Backend[AnyCache], manifest: Manifest, path: Path) -> None:
        """`manifest` is the own bundle's, `path` where the reader's is."""
        self._own, self._reader = own, reader
        ids = np.linspace(0, manifest.vocab_size - 1, min(_SAMPLE, manifest.cache.capacity)).astype(np.int64)
        for one, other in zip(*(_first_layer(backend, ids) for backend in (own, reader)), strict=True):
            if not np.linalg.norm(other - one) <= _MOST * np.linalg.norm(one):  # nor if one is not a number
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
        return (self._own if all_logits else self._reader).prefill(cache, row, ids, all_logits)

    def hidden_states(self, cache: AnyCache, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Backend."""
        return self._own.hidden_states(cache, row, ids)

    def decode(self, cache: AnyCache, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """See Backend."""
        return self._own.decode(cache, tokens, active)


def _first_layer(backend: Backend[Any], ids: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Keys and values, [Hkv, T, D] each, of tokens [T]."""
    cache = backend.new_cache(1, len(ids))
    backend.prefill(cache, 0, ids)
    assert cache.host is not None  # `load` refuses GPUs
    return [array.astype(np.float64) for array in cache.host.read(0, len(ids))[:2]]
