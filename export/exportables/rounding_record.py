"""`weights.json` of a bundle: what was done to each rounded weight. A proof finds the weights again by it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from headfold.export.exportables.rounded import RoundedCheckpoint
from headfold.export.model.rounding import Form, Rounded, restored
from headfold.plugins.quantized.schema import BLOCK, LARGEST_BLOCK, SMALLEST_BLOCK, Bits
from headfold.runtime.errors import BundleError
from headfold.runtime.files.json_file import read_object

RECORD = "weights.json"
Method = Literal["nearest", "gptq"]  # of rounding
_LARGEST = 1 << 24  # bytes of it
_BLOCKS = [1 << power for power in range(SMALLEST_BLOCK.bit_length() - 1, LARGEST_BLOCK.bit_length())]


@dataclass(frozen=True)
class WeightRecord:
    """Of one weight."""

    bits: Bits
    # "nearest" is a rule, which the checkpoint alone decides; see `headfold.export.model.rounding`. "kept" are a checkpoint's own bits.
    method: Method | Literal["kept"]
    relative_squared_error: float  # |rounded - w|^2 / |w|^2: 0 for one that is kept bit for bit
    sha256: str  # of numbers, scales, and zero points, offsets and order where there are some
    quantized: str | None = None  # what the checkpoint has it in; if it is not kept, it was rounded twice
    kl: float | None = None  # nats that four bits cost in it alone, with those joined with it; None: not measured
    block_size: int = BLOCK
    zero_points: bool = False
    offsets: bool = False  # of blocks, which are added: GGUF's minima
    order: str | None = None  # of its columns where they are not stored as they come (GPTQ's act-order)

    @property
    def form(self) -> Form:
        """How the graph has it."""
        return Form(self.bits, self.block_size, self.zero_points, self.offsets, self.order)


def record_of(checkpoint: RoundedCheckpoint, costs: Mapping[str, float]) -> dict[str, WeightRecord]:
    """What was done, and what it does to each weight; `costs` are the KLs of `WeightRecord`."""
    records = {}
    for name, form in checkpoint.forms.items():
        rounding = checkpoint.rounded(name)
        kind = checkpoint.original.kind(name)
        error = relative_squared_error(rounding, checkpoint.original.read(name))
        method: Method | Literal["kept"] = (
            "kept" if name in checkpoint.kept else "gptq" if name in checkpoint.found else "nearest"
        )
        more = form.block, form.zeros, form.offsets, form.order
        records[name] = WeightRecord(form.bits, method, error, digest(rounding), kind, costs.get(name), *more)
    return records


def relative_squared_error(rounding: Rounded, weight: Tensor) -> float:
    """See WeightRecord."""
    exact = weight.double()
    return (restored(rounding).double() - exact).square().sum().item() / (exact.square().sum().item() or 1.0)


def digest(rounding: Rounded) -> str:
    """See WeightRecord."""
    parts = (rounding.values, rounding.scales, rounding.zeros, rounding.offsets, rounding.order)
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in parts if x is not None)).hexdigest()


def record_to_json(records: Mapping[str, WeightRecord]) -> dict[str, Any]:
    """The file's content."""
    return {"tensors": {name: asdict(record) for name, record in records.items()}}


def read_record(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightRecord]:
    """The file's records, of weights that a checkpoint with these shapes has.

    Raises:
        BundleError: it holds something else.
    """
    fix = "Export the bundle again."
    if not path.is_file():
        raise BundleError("is missing", where=path, fix=fix)
    content = read_object(path, _LARGEST, BundleError, fix)
    try:
        records = {name: WeightRecord(**record) for name, record in content["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"is no record of rounded weights: {error}", where=path, fix=fix) from error
    for name, record in records.items():
        kept, block, shape = record.method == "kept", record.block_size, shapes.get(name, ())
        known = record.bits in get_args(Bits) and (record.method in get_args(Method) or kept)
        known = known and (kept or record.form == Form(record.bits)) and block in _BLOCKS
        if not known or len(shape) != 2 or shape[1] % block:
            raise BundleError(f"{name} cannot have been rounded so", where=path, fix=fix)
    return records
