"""`weights.json` of a bundle: what was done to each rounded weight. A proof finds the weights again by it."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.exportables.rounded import RoundedCheckpoint, RoundedTensors, SmoothedCheckpoint
from headfold.export.model.config import ModelConfig
from headfold.export.model.rounding import Form, Rounded, Width, by_rows, form_of
from headfold.export.model.smoothing import LARGEST, Exponents, seams
from headfold.plugins.quantized.schema import BLOCK, FLOAT4_BLOCK, LARGEST_BLOCK, SMALLEST_BLOCK
from headfold.runtime.errors import BundleError
from headfold.runtime.files.json_file import RECORD_BYTES, read_object

Method = Literal["nearest", "gptq"]  # of rounding
_BLOCKS = [1 << power for power in range(SMALLEST_BLOCK.bit_length() - 1, LARGEST_BLOCK.bit_length())]


@dataclass(frozen=True)
class WeightRecord:
    """Of one weight."""

    bits: Width
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
    transposed: bool = False  # in the checkpoint: some experts' matrices
    narrow_scales: bool = False  # of float16, whatever the bundle's dtype
    wide_rows: int = 0  # so many of its first rows have eight bits, the others `bits`

    @property
    def form(self) -> Form:
        """How the graph has it."""
        more = self.order, self.transposed, self.narrow_scales, self.wide_rows
        return Form(self.bits, self.block_size, self.zero_points, self.offsets, *more)


@dataclass(frozen=True)
class RoundingRecord:
    """Of a model."""

    tensors: Mapping[str, WeightRecord]
    smoothing: Exponents = field(default_factory=dict)  # before rounding

    def smoothed(self, checkpoint: Checkpoint) -> Checkpoint:
        """What was rounded."""
        return SmoothedCheckpoint(checkpoint, self.smoothing) if self.smoothing else checkpoint


def record_of(checkpoint: RoundedTensors, costs: Mapping[str, float]) -> RoundingRecord:
    """What was done, and what it does to each weight; `costs` are the KLs of `WeightRecord`."""
    records = {}
    for name, form in checkpoint.forms.items():
        rounding = checkpoint.rounded(name)
        kind = checkpoint.original.kind(name) if isinstance(checkpoint, RoundedCheckpoint) else None
        error = relative_squared_error(rounding, checkpoint.original.read(name))
        method: Method | Literal["kept"] = (
            "kept" if name in checkpoint.kept else "gptq" if name in checkpoint.found else "nearest"
        )
        more = form.block, form.zeros, form.offsets, form.order, form.transposed, form.narrow, form.wide_rows
        records[name] = WeightRecord(form.bits, method, error, digest(rounding), kind, costs.get(name), *more)
    original = checkpoint.original
    return RoundingRecord(records, original.exponents if isinstance(original, SmoothedCheckpoint) else {})


def relative_squared_error(rounding: Rounded, weight: Tensor) -> float:
    """See WeightRecord."""
    lost = kept = 0.0
    for now, before in by_rows(rounding, weight):
        exact = before.double()
        lost += (now.double() - exact).square().sum().item()
        kept += exact.square().sum().item()
    return lost / (kept or 1.0)


def digest(rounding: Rounded) -> str:
    """See WeightRecord."""
    found = hashlib.sha256()
    for part in (rounding.values, rounding.scales, rounding.zeros, rounding.offsets, rounding.order):
        if part is not None:
            found.update(part.contiguous().view(torch.uint8).numpy().data)  # numpy has no float8
    return found.hexdigest()


def record_to_json(record: RoundingRecord) -> dict[str, Any]:
    """The file's content."""
    content: dict[str, Any] = {"tensors": {name: asdict(tensor) for name, tensor in record.tensors.items()}}
    smoothing = {name: exponents.tolist() for name, exponents in record.smoothing.items()}
    return content | ({"smoothing": smoothing} if smoothing else {})


def read_record(path: Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig | None) -> RoundingRecord:
    """The file's record, of weights of these shapes; `config` is that of a decoder of ours, which may have been smoothed.

    Raises:
        BundleError: it holds something else.
    """
    fix = "Export the bundle again."
    if not path.is_file():
        raise BundleError("is missing", where=path, fix=fix)
    content = read_object(path, RECORD_BYTES, BundleError, fix)
    try:
        records = {name: WeightRecord(**record) for name, record in content["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"is no record of rounded weights: {error}", where=path, fix=fix) from error
    if not records:
        raise BundleError("names no rounded weight", where=path, fix=fix)
    for name, record in records.items():
        kept, block, shape = record.method == "kept", record.block_size, shapes.get(name, ())
        known = record.bits in get_args(Width) and (record.method in get_args(Method) or kept)
        lost = record.relative_squared_error
        known = known and isinstance(lost, float) and 0 <= lost < math.inf and type(block) is int
        if known and len(shape) == 3:
            known = record.method == "nearest" and record.form == Form(record.bits, transposed=record.transposed)
            known = known and not record.form.by_output and shape[1] % block == shape[2] % block == 0
        elif len(shape) != 2:
            known = False
        elif known and record.form.by_output:
            known = record.method == "nearest" or (kept and record.bits == "float8")
            known = known and record.form == form_of(record.bits, shape[1])
        elif known:
            known = block in _BLOCKS and shape[1] % block == 0
            plain = Form(record.bits, block, narrow=record.narrow_scales, wide_rows=record.wide_rows)
            own = FLOAT4_BLOCK if record.bits == "float4" else max(block, BLOCK)  # of what headfold rounds
            known = known and ((kept and record.bits != "float4") or (record.form == plain and block == own))
            known = known and type(record.wide_rows) is int and 0 <= record.wide_rows < shape[0]
            known = known and (record.wide_rows == 0 or (record.bits == 4 and not kept))
        if not known:
            raise BundleError(f"{name} cannot have been rounded so", where=path, fix=fix)
    return RoundingRecord(records, _smoothing(content.get("smoothing", {}), shapes, config, path))


def _smoothing(
    content: Any, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig | None, path: Path
) -> Exponents:
    fix = "Export the bundle again."
    if not isinstance(content, dict) or (config is None and content):
        raise BundleError("has no exponents for smoothing", where=path, fix=fix)
    if config is None:
        return {}
    places = [seam for layer in range(config.num_hidden_layers) for seam in seams(config, layer)]
    sizes = {seam.name: shapes[seam.readers[0]][1] for seam in places}
    for name, exponents in content.items():
        known = isinstance(exponents, list) and len(exponents) == sizes.get(name)
        if not known or not all(type(e) is int and abs(e) <= LARGEST for e in exponents):
            raise BundleError(f"{name} cannot have been smoothed so", where=path, fix=fix)
    return {name: torch.tensor(exponents) for name, exponents in content.items()}
