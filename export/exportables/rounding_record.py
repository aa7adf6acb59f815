"""`weights.json` of a bundle: what was done to each rounded weight. A proof finds the weights again by it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from headfold.export.exportables.rounded import RoundedCheckpoint
from headfold.export.model.rounding import Rounded, restored
from headfold.plugins.quantized.schema import BLOCK, Bits
from headfold.runtime.errors import BundleError
from headfold.runtime.files.json_file import read_object

RECORD = "weights.json"
Method = Literal["nearest", "gptq"]
_LARGEST = 1 << 24  # bytes of it


@dataclass(frozen=True)
class WeightRecord:
    """Of one weight."""

    bits: Bits
    method: Method  # "nearest" is a rule, which the checkpoint alone decides; see `headfold.export.model.rounding`
    relative_squared_error: float  # |rounded - w|^2 / |w|^2: 0 for one that is kept bit for bit
    sha256: str  # of numbers, then scales
    kl: float | None = None  # nats that four bits cost in it alone, with those joined with it; None: not measured


def record_of(checkpoint: RoundedCheckpoint, costs: Mapping[str, float]) -> dict[str, WeightRecord]:
    """What was done, and what it does to each weight; `costs` are the KLs of `WeightRecord`."""
    records = {}
    for name, bits in checkpoint.bits.items():
        rounding = checkpoint.rounded(name)
        error = relative_squared_error(rounding, checkpoint.original.read(name))
        method: Method = "gptq" if name in checkpoint.found else "nearest"
        records[name] = WeightRecord(bits, method, error, digest(rounding), costs.get(name))
    return records


def relative_squared_error(rounding: Rounded, weight: Tensor) -> float:
    """See WeightRecord."""
    exact = weight.double()
    return (restored(*rounding).double() - exact).square().sum().item() / (exact.square().sum().item() or 1.0)


def digest(rounding: Rounded) -> str:
    """See WeightRecord."""
    values, scales = rounding
    return hashlib.sha256(values.contiguous().numpy().tobytes() + scales.contiguous().numpy().tobytes()).hexdigest()


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
        known = record.bits in get_args(Bits) and record.method in get_args(Method)
        shape = shapes.get(name, ())
        if not known or len(shape) != 2 or shape[1] % BLOCK:
            raise BundleError(f"{name} cannot have been rounded so", where=path, fix=fix)
    return records
