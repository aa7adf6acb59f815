"""What a model has computed of a text, kept across processes: a long system prompt is paid for once."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from headfold.runtime.backend import Backend
from headfold.runtime.errors import InputError
from headfold.runtime.files.cache_file import CacheFile
from headfold.runtime.manifest import Manifest
from headfold.runtime.scheduling.request import Ids
from headfold.runtime.scheduling.scheduler import Scheduler


class CacheState:
    """Saves and loads for one model; what is loaded is found by calls with `reuse`."""

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend[Any],
        manifests: Sequence[Manifest],
        encode: Callable[[Any], Ids],
    ) -> None:
        """`manifests`: of the bundles that compute it, the model's own first."""
        self._scheduler, self._backend, self._encode = scheduler, backend, encode
        self._file = CacheFile(manifests)

    def save(self, path: str | PathLike[str], prompt: Any) -> int:
        """Compute keys and values of a prompt of any kind, and write them. Returns its number of tokens.

        Raises:
            InputError: the prompt cannot be used, the file not be written, or the cache is not in this process's memory.
            CapacityError: the prompt does not fit.
        """
        ids = self._encode(prompt)
        cache = self._scheduler.run(lambda: self._backend.new_cache(1, len(ids)))
        if cache.host is None:
            raise InputError("the cache is in the GPU's memory", fix="Save it with provider 'cpu'.")
        self._scheduler.compute(cache, ids)
        self._file.write(Path(path), ids, cache.host.read(0, len(ids)))
        return len(ids)

    def load(self, path: str | PathLike[str]) -> int:
        """Keep what was saved for calls that begin with it. Returns its number of tokens.

        Raises:
            InputError: it is no such file, of another bundle, or damaged; or the cache is not in this process's memory.
            CapacityError: it is more than what may be kept.
            BusyError: all slots are in use.
        """
        ids, arrays = self._file.read(Path(path), self._scheduler.capacity)
        self._scheduler.keep(ids, arrays)
        return len(ids)
