"""Which tensors a Hugging Face directory has, under the decoder's names, whatever tied, base or older checkpoints call or add."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headfold.export.checkpoints.side_files import INDEX, SINGLE, read_json, refuse_pointer
from headfold.runtime.errors import CheckpointError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HARMLESS = re.compile(  # what training and serving leave beside the weights, and no forward pass reads
    r"(^|\.)rotary_emb\.[a-z_]+$|^v_head\.|(^|\.)[qkv]_scale$|\.masked_bias$|\.self_attn\.bias$|^value_head\."
)
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB|weight_blocks)$"
)
_AGAIN = "Download it again."


@dataclass(frozen=True)
class Stored:
    """One tensor: the file it is in, its name there, shape and dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Its values, on the CPU."""
        with opened(self.file) as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
            return tensor


def scan(directory: Path, expected: Iterable[str], tied: bool) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor by the decoder's name, from the headers alone; and the names of those that were left aside as harmless.

    Args:
        directory: with safetensors.
        expected: the decoder's names.
        tied: whether head and embedding are one tensor, which may be stored under either name.

    Raises:
        CheckpointError: a file is missing, damaged or a pointer, its tensors are quantized, or one is not where the index says.
    """
    files = _locate(directory)
    stored, ignored = {}, []
    based = not any(name.startswith("model.") for name in files)  # a checkpoint of the model without its head
    wanted = set(expected)
    for path in sorted(set(files.values())):
        refuse_pointer(path)
        with opened(path) as file:
            there = set(file.keys())
            for name in (name for name, place in files.items() if place == path):
                ours = f"model.{name}" if based and f"model.{name}" in wanted else name
                if name not in there:
                    if tied and ours == HEAD:  # an index may list what is not stored twice
                        continue
                    raise CheckpointError(f"tensor {name} is not in it, though {INDEX} says so", where=path, fix=_AGAIN)
                if ours not in wanted and ours != HEAD and _HARMLESS.search(name):
                    ignored.append(name)
                    continue
                stored[ours] = _described(path, file, name, directory)
    if tied and EMBEDDING not in stored and HEAD in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    return stored, ignored


def stored_sizes(directory: Path) -> tuple[int, int]:
    """How many tensors the safetensors of a directory hold, and how many elements, from the headers alone.

    Raises:
        CheckpointError: a file is damaged or a pointer.
    """
    tensors = elements = 0
    for path in directory.glob("*.safetensors"):
        refuse_pointer(path)
        with opened(path) as file:
            for name in list(file.keys()):
                tensors, elements = tensors + 1, elements + math.prod(file.get_slice(name).get_shape())
    return tensors, elements


def _described(path: Path, file: Any, name: str, directory: Path) -> Stored:
    part = file.get_slice(name)
    kind = part.get_dtype()
    if kind not in DTYPES or _QUANTIZED.search(name):
        method = _method(directory)
        raise CheckpointError(
            f"tensor {name} is {kind}{f': the checkpoint is quantized ({method})' if method else ''}",
            where=path,
            fix=f"headfold reads {', '.join(DTYPES)}: take the unquantized one.",
        )
    return Stored(path, name, tuple(part.get_shape()), DTYPES[kind])


def _method(directory: Path) -> str:
    """What config.json says of its quantization."""
    settings = read_json(directory / "config.json").get("quantization_config")
    return str(settings.get("quant_method", "unknown")) if isinstance(settings, Mapping) else ""


def _locate(directory: Path) -> dict[str, Path]:
    """The file of every tensor. As in transformers, a single file wins over an index, which is then of older shards."""
    if (directory / SINGLE).is_file():
        refuse_pointer(directory / SINGLE)
        with opened(directory / SINGLE) as file:
            return dict.fromkeys(file.keys(), directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise _nothing(directory)
    shards = shards_of(directory / INDEX)
    for shard in sorted(set(shards.values())):
        if not (directory / shard).is_file():
            raise CheckpointError("shard is missing", where=directory / shard, fix="Download the checkpoint again.")
    return {name: directory / shard for name, shard in shards.items()}


def shards_of(index: Path) -> dict[str, str]:
    """The shard of every tensor, as an index says.

    Raises:
        CheckpointError: it is no index, or names a file that is not beside it.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError("has no weight_map", where=index, fix=_AGAIN)
    for shard in set(shards.values()):
        if Path(shard).name != shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"names {shard!r}, which is no safetensors file beside it", where=index, fix=_AGAIN)
    return shards


def _nothing(directory: Path) -> CheckpointError:
    if (directory / "adapter_config.json").is_file():
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        return CheckpointError(
            f"is an adapter of {base or 'another model'}, not a model", where=directory, fix="Merge it into its base."
        )
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
    if pickles:
        return CheckpointError(
            f"has only {pickles[0]}, and pickles are never loaded: they can run any code",
            where=directory,
            fix="Convert it with transformers: AutoModelForCausalLM.from_pretrained(..).save_pretrained(..).",
        )
    return CheckpointError(f"has no {SINGLE} and no {INDEX}", where=directory, fix="Download the checkpoint again.")


def opened(path: Path) -> Any:
    """A safetensors file. Raises CheckpointError: it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged: {error}", where=path, fix="Download the checkpoint again.") from error
