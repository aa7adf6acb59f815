"""Hugging Face directories, in and out: config.json, one or sharded safetensors, tokenizer files. Pickles are never loaded.

Strict both ways: what is read has exactly the decoder's tensors, and what is written loads in transformers unchanged.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headfold.export.checkpoints.base import Checkpoint, TokenizerFiles, check_tensors
from headfold.export.checkpoints.families import config_from_json, config_to_json
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.publishing import one_line, publish
from headfold.runtime.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HuggingFaceCheckpoint:
    """A directory with config.json and safetensors; see `headfold.export.checkpoints.base.Checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly those of the model.
        ConfigError: the model is not one headfold implements.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_from_json(read_json(path / CONFIG), path / CONFIG)
        self.tokenizer = TokenizerFiles({n: (path / n).read_bytes() for n in TOKENIZER_FILES if (path / n).is_file()})
        self._files = self._locate()
        self._dtypes: dict[str, torch.dtype] = {}
        found = self._scan()
        self._shapes = expected_shapes(self.config)
        if self.config.tie_word_embeddings and found.get(_HEAD) == found.get(_EMBEDDING) is not None:
            del found[_HEAD]  # a copy, if it is one
            if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
                raise CheckpointError(
                    "lm_head.weight differs from the embedding, though tie_word_embeddings is true",
                    where=path,
                    fix="Set tie_word_embeddings to false in config.json if the head is meant to be used.",
                )
        check_tensors(path, self._shapes, found)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Checkpoint."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self._dtypes[name]

    def read(self, name: str) -> torch.Tensor:
        """See Checkpoint."""
        with safe_open(self._files[name], framework="pt") as file:
            return cast(torch.Tensor, file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor."""
        if (self.path / INDEX).is_file():
            shards = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise CheckpointError("has no weight_map", where=self.path / INDEX, fix="Download it again.")
            for shard in sorted(set(shards.values())):
                if Path(shard).name != shard or not (self.path / shard).is_file():
                    raise CheckpointError(
                        "shard is missing", where=self.path / shard, fix="Download the checkpoint again."
                    )
            return {name: self.path / shard for name, shard in shards.items()}
        if not (self.path / SINGLE).is_file():
            pickles = sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*"))
            if pickles:
                raise CheckpointError(
                    f"has only {pickles[0]}, and pickles are never loaded: they can run any code",
                    where=self.path,
                    fix="Convert it with transformers: AutoModelForCausalLM.from_pretrained(..).save_pretrained(..).",
                )
            raise CheckpointError(
                f"has no {SINGLE} and no {INDEX}", where=self.path, fix="Download the checkpoint again."
            )
        with _opened(self.path / SINGLE) as file:
            return dict.fromkeys(file.keys(), self.path / SINGLE)

    def _scan(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone; checks that they are where the index says, and are floats."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            names = [name for name, file in self._files.items() if file == path]
            with _opened(path) as file:
                there = set(file.keys())
                for name in names:
                    if name not in there:
                        raise CheckpointError(
                            f"tensor {name} is not in it, though {INDEX} says so", where=path, fix="Download it again."
                        )
                    part = file.get_slice(name)
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue  # a buffer that old versions of transformers saved; config.json says the same
                    if part.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"tensor {name} is {part.get_dtype()}",
                            where=path,
                            fix=f"headfold reads {', '.join(_DTYPES)}: take the unquantized one.",
                        )
                    shapes[name], self._dtypes[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        return shapes


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged: {error}", where=path, fix="Download the checkpoint again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, or is no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"has no {path.name}", where=path.parent, fix="Name a Hugging Face directory.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"is not JSON: {error}", where=path, fix="Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError("is no JSON object", where=path, fix="Download it again.")
    return content


def download(name: str) -> Path:
    """Fetch `organisation/name` from the Hugging Face hub into its cache: configuration, safetensors, tokenizer.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES]))
    except Exception as error:  # whatever its HTTP client raises: it has changed clients twice
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"is no file here and cannot be fetched from the hub: {reason}",
            where=name,
            fix="Download it, and name its directory.",
        ) from error


def save_hf(directory: Path, checkpoint: Checkpoint, dtype: torch.dtype, max_shard_bytes: int = 4 << 30) -> None:
    """Write a checkpoint as a directory that transformers loads unchanged, complete or not at all; see `write_hf`.

    Raises:
        CheckpointError: `directory` exists, or cannot be written.
    """
    with one_line(CheckpointError, directory, "Free some space, or choose another place."), publish(directory) as stage:
        write_hf(stage, checkpoint, dtype, max_shard_bytes)


def write_hf(stage: Path, checkpoint: Checkpoint, dtype: torch.dtype, max_shard_bytes: int = 4 << 30) -> None:
    """Write a checkpoint's files into a directory that exists.

    One shard at a time is in memory: at most `max_shard_bytes`, or one tensor.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in checkpoint.shapes().items():
        count = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + count > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: checkpoint.read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, stage / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(torch.Size(shape).numel() for shape in checkpoint.shapes().values()) * dtype.itemsize
    if len(shards) > 1:
        _write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = config_to_json(checkpoint.config) | {"dtype": str(dtype).removeprefix("torch.")}
    _write_json(stage / CONFIG, content)
    for name, data in checkpoint.tokenizer.files.items():
        (stage / name).write_bytes(data)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
