"""Give a traced graph its weights: each initializer becomes a promise to read it from the checkpoint, kept while saving.

So at any time about one of them is in memory, whatever the size of the model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.graph.passes import JOINED, TRANSPOSED
from headfold.export.model.decoder import Scales
from headfold.export.model.rope import rope_tables
from headfold.plugins.schema import SCALES
from headfold.runtime.errors import CheckpointError, HeadfoldError

_INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference can see them


def attach_weights(
    model: ir.Model,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    capacity: int,
    allow_nan: bool,
    scales: Sequence[Scales] = (),
) -> int:
    """Attach the checkpoint's tensors, cast to `dtype`, and rotary tables for `capacity` positions; returns the weights' bytes.

    `scales` are those of a quantized cache, of each layer.

    Nothing is read before the graph is saved; reading raises CheckpointError for a value that is not finite, or that `dtype`
    cannot hold, unless `allow_nan`.
    """
    tables = dict(zip(("cos_cache", "sin_cache"), rope_tables(checkpoint.config, capacity), strict=True))
    tables = {name: table.to(dtype) for name, table in tables.items()}
    for layer, pair in enumerate(scales):
        tables |= {f"model.layers.{layer}.self_attn.{name}": scale for name, scale in zip(SCALES, pair, strict=True)}
    total = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        base = name.removesuffix(TRANSPOSED)
        parts = base.split(JOINED)
        if base in tables:
            value.const_value = TorchTensor(tables[base], name=name)
        elif all(part in checkpoint.shapes() for part in parts):
            assert tensor is not None
            read = _reader(checkpoint, name, parts, dtype, allow_nan)
            value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
            total += tensor.nbytes
    return total


def _reader(
    checkpoint: Checkpoint, name: str, parts: list[str], dtype: torch.dtype, allow_nan: bool
) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        tensors = [checked(checkpoint, part, dtype, allow_nan) for part in parts]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # which would copy it
        return TorchTensor((tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous(), name=name)

    return read


def checked(checkpoint: Checkpoint, name: str, dtype: torch.dtype, allow_nan: bool) -> torch.Tensor:
    """One tensor of the checkpoint in `dtype`.

    Raises:
        CheckpointError: it holds NaN or infinity, or a value `dtype` cannot hold, and `allow_nan` is not set.
    """
    source = checkpoint.read(name)
    tensor = source.to(dtype)
    if not allow_nan and not torch.isfinite(tensor).all():
        if not torch.isfinite(source).all():
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity",
                where=checkpoint.path,
                fix="The checkpoint is damaged or training diverged; --allow-nan exports it all the same.",
            )
        raise CheckpointError(
            f"tensor {name} has values up to {source.abs().max().item():.3g}, more than {str(dtype).removeprefix('torch.')} holds",
            where=checkpoint.path,
            fix="Export with --dtype bfloat16 or float32.",
        )
    return tensor


def save_model(model: ir.Model, path: Path, on_tensor: Callable[[str, int], None]) -> None:
    """Write the graph to `path` and its weights beside it as `<name>.data`, reading them one by one.

    `on_tensor` is told the name and bytes of each tensor before it is written.
    """

    def callback(tensor: ir.TensorProtocol, _: object) -> None:
        on_tensor(tensor.name or "", tensor.nbytes)

    try:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE, callback=callback)
    except ir.serde.SerdeError as error:  # wraps what reading a small tensor raised, once per level of the graph
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HeadfoldError):
            cause = cause.__cause__
        raise cause or error from None
