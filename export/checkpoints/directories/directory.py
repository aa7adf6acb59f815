"""A Hugging Face directory as both roads read it: configuration, tokenizer files, tensors by name; an adapter is one over its base."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headfold.export.checkpoints.directories.adapter import Adapter, is_adapter, one_tensor, open_adapter
from headfold.export.checkpoints.directories.hub import download, is_hub_name
from headfold.export.checkpoints.directories.stored import EMBEDDING, HEAD, Source, Stored, stored_tensors
from headfold.export.checkpoints.quantized.formats import dequantized, format_of, left_over
from headfold.export.checkpoints.quantized.parts import Format
from headfold.export.checkpoints.side_files import ADAPTER_CONFIG, CONFIG, read_json, side_files
from headfold.export.model.numbers import check_numbers
from headfold.runtime.errors import CheckpointError, ConfigError


class Directory:
    """See module.

    Args:
        path: a directory with config.json and safetensors, or with an adapter.
        base: of the adapter, a directory or hub name; by default what the adapter's configuration names.

    Raises:
        CheckpointError: a file is missing or damaged, or the base is not to be found.
        ConfigError: config.json has numbers that no model has; weights are quantized, or an adapter is of a kind, that headfold
            does not read.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self.adapter: Adapter | None = None
        self.place = path  # of configuration and weights
        if is_adapter(path):
            self.adapter = open_adapter(path)
            self.place = _base_of(self.adapter, base)
        elif base is not None:
            raise CheckpointError("is no adapter, and needs no base", where=path, fix="Leave --base out.")
        self.config: Mapping[str, Any] = read_json(self.place / CONFIG)
        check_numbers(self.config, self.place / CONFIG)
        self._format = self._named_format()
        self.ignored: list[str] = []

    def _named_format(self) -> Format | None:
        settings = self.config.get("quantization_config")
        if settings is None:
            return None
        try:
            return format_of(settings, self.place)
        except ConfigError:
            if left_over(settings, stored_tensors(self.place)):
                return None
            raise

    @property
    def as_stored(self) -> bool:
        """Whether every tensor is one that lies in its files, and transformers would read those files."""
        return not self.made

    @property
    def format(self) -> Format | None:
        """What its tensors are quantized in; None where none is, whatever config.json has left over."""
        return self._format if any(not isinstance(source, Stored) for source in self._unmerged.values()) else None

    @property
    def titles(self) -> dict[str, str]:
        """What a person calls its quantization and its adapter, where it has them."""
        titles = {"quantization": self.format.title} if self.format is not None else {}
        if self.adapter is not None:
            titles["adapter"] = f"{self.adapter.title} over {self.place}"
        return titles

    @property
    def made(self) -> str:
        """How tensors come about that are not as they are stored: for reports; may be empty."""
        steps = [f"dequantized ({self.format.title})"] if self.format is not None else []
        steps += ["merged with its adapter"] if self.adapter is not None else []
        if not steps and (self.place / ADAPTER_CONFIG).is_file():
            return "read"  # transformers would take what is left of an adapter for one, and look for its base
        return " and ".join(steps)

    @cached_property
    def tokenizer(self) -> Mapping[str, bytes]:
        """Its own files, and its base's where it has none."""
        return {**side_files(self.place), **(side_files(self.path) if self.place != self.path else {})}

    @cached_property
    def tensors(self) -> Mapping[str, Source]:
        """By the names in its files; none is read.

        Raises:
            CheckpointError: a file is missing or damaged, or tensors do not fit together.
        """
        return self.adapter.over(self._unmerged) if self.adapter is not None else self._unmerged

    @cached_property
    def _unmerged(self) -> Mapping[str, Source]:
        stored = stored_tensors(self.place)
        if self._format is None:
            return stored
        tensors, self.ignored = dequantized(self._format, stored)
        return tensors

    def check_tied(self) -> None:
        """Of a model whose head is its embedding: an adapter must not change only one of them, nor add to both.

        Raises:
            CheckpointError: it does.
        """
        adapter = self.adapter
        if adapter is None or not (adapter.changes("embed_tokens") or adapter.changes("lm_head")):
            return
        both = [adapter.whole.get(name) for name in (EMBEDDING, HEAD)]
        if both[0] is None or both[1] is None or not torch.equal(both[0].read(), both[1].read()):
            raise one_tensor(self.path)


def check_copy(head: Source, embedding: Source, path: Path) -> None:
    """Of a model whose head is its embedding, and whose files have one all the same. Raises CheckpointError: it is another."""
    if not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            "lm_head.weight differs from the embedding, though tie_word_embeddings is true",
            where=path,
            fix="Set tie_word_embeddings to false in config.json if the head is meant to be used.",
        )


def _base_of(adapter: Adapter, base: Path | None) -> Path:
    """The directory of an adapter's base; it may be fetched."""
    named = base if base is not None else adapter.settings.base_model_name_or_path
    fix = "Name its directory: --base DIR."
    if not named:
        raise CheckpointError("does not say what it is an adapter of", where=adapter.path, fix=fix)
    places = [Path(named)] if base is not None else [adapter.path / str(named), Path(named)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        if not is_hub_name(Path(named)):
            raise CheckpointError(f"its base {named} is not there", where=adapter.path, fix=fix)
        try:
            found = download(str(named), adapter.settings.revision if base is None else None)
        except CheckpointError as error:
            raise CheckpointError(f"its base {named} {error.what}", where=adapter.path, fix=fix) from error
    if is_adapter(found):
        raise CheckpointError(f"its base {named} is an adapter too", where=adapter.path, fix="Merge that one first.")
    return found
