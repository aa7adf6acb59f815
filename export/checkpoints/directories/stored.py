"""The tensors that lie in the safetensors of a Hugging Face directory, by the names they have there, from the headers alone.

What a road reads are Sources: a tensor as it is stored, or as quantized parts or an adapter make it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from headfold.export.checkpoints.quantized.tensor import QuantizedTensor
from headfold.export.checkpoints.side_files import INDEX, SINGLE, read_json, refuse_pointer
from headfold.runtime.errors import CheckpointError

AGAIN = "Download it again."
OTHERS = "The file is damaged, or its config.json is another's."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Source(Protocol):
    """One tensor by its name in a directory, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Known before anything is read."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        ...

    def read(self) -> torch.Tensor:
        """Its values, on the CPU."""
        ...

    def quantized(self) -> QuantizedTensor | None:
        """The integers or 8-bit floats it is stored in, with their scales; None where it is not stored so."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored; see Source."""

    file: Path
    name: str  # in the file
    kind: str  # what safetensors calls its dtype
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """See Source.

        Raises:
            CheckpointError: it is of a dtype that headfold does not read.
        """
        if self.kind not in _DTYPES:
            raise CheckpointError(
                f"tensor {self.name} is {self.kind}", where=self.file, fix=f"headfold reads {', '.join(_DTYPES)}."
            )
        return _DTYPES[self.kind]

    def read(self) -> torch.Tensor:
        """See Source."""
        with opened(self.file) as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
            return tensor

    def quantized(self) -> None:
        """See Source."""
        return None

    def of(self, shape: tuple[int, ...], *kinds: str) -> "Stored":
        """Itself.

        Raises:
            CheckpointError: it is of another shape, or none of these dtypes.
        """
        if self.shape != shape or self.kind not in kinds:
            raise CheckpointError(
                f"tensor {self.name} is {self.kind} {list(self.shape)} instead of {' or '.join(kinds)} {list(shape)}",
                where=self.file,
                fix=OTHERS,
            )
        return self


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory. As in transformers, a single file wins over an index, which is then of older shards.

    Raises:
        CheckpointError: a file is missing, damaged or a pointer, or a tensor is not where the index says.
    """
    if (directory / SINGLE).is_file():
        return tensors_of(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise _nothing(directory)
    shards, stored = shards_of(directory / INDEX), dict[str, Stored]()
    for shard in sorted(set(shards.values())):
        path = directory / shard
        if not path.is_file():
            raise CheckpointError("shard is missing", where=path, fix="Download the checkpoint again.")
        there = tensors_of(path)
        for name in (name for name, place in shards.items() if place == shard):
            if name in there:
                stored[name] = there[name]
            elif name != HEAD:  # an index may list what is not stored twice
                raise CheckpointError(f"tensor {name} is not in it, though {INDEX} says so", where=path, fix=AGAIN)
    return stored


def shards_of(index: Path) -> dict[str, str]:
    """The shard of every tensor, as an index says.

    Raises:
        CheckpointError: it is no index, or names a file that is not beside it.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError("has no weight_map", where=index, fix=AGAIN)
    for shard in set(shards.values()):
        if Path(shard).name != shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"names {shard!r}, which is no safetensors file beside it", where=index, fix=AGAIN)
    return shards


def tensors_of(path: Path) -> dict[str, Stored]:
    """Every tensor of a file.

    Raises:
        CheckpointError: it is damaged or a pointer.
    """
    refuse_pointer(path)
    found = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            found[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return found


def _nothing(directory: Path) -> CheckpointError:
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
