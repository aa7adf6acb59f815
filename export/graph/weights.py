"""Give a traced graph its weights: each initializer becomes a promise to read it from the checkpoint, kept while saving.

So at any time about one of them is in memory, whatever the size of the model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from headfold.export.exportables.base import Tensors
from headfold.export.graph.recipes import WeightRecipe, recipe_of
from headfold.export.model.decoder import Scales
from headfold.plugins.attention.schema import SCALES
from headfold.plugins.names import scale_name
from headfold.runtime.errors import BundleError, CheckpointError, ConfigError, HeadfoldError
from headfold.runtime.session import SILENT, silenced

_AT_ONCE = 1 << 22  # numbers that are looked at together
_INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference can see them


def attach_weights(model: ir.Model, tensors: Tensors, tables: Mapping[str, Tensor], allow_nan: bool) -> int:
    """Attach the tensors, each cast to the dtype it was traced in, and tables as they are, by name; returns the weights' bytes.

    Nothing is read before the graph is saved; reading raises CheckpointError for a value that is not finite, or that the dtype
    cannot hold, unless `allow_nan`.

    Raises:
        ConfigError: there is a tensor that the graph does not have, or one in the graph that is none of them.
    """
    total, taken = 0, set[str]()
    for name, value in model.graph.initializers.items():
        recipe, tensor = recipe_of(value), value.const_value
        if name in tables:
            value.const_value = TorchTensor(tables[name], name=name)
        elif recipe is not None and tensor is not None:
            taken.update(recipe.sources)
            read = _reader(tensors, name, recipe, to_torch_dtype(tensor.dtype), allow_nan)
            value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
            total += tensor.nbytes
        elif getattr(getattr(tensor, "raw", None), "is_meta", False):  # of torch's exporter, whose classes are its own
            raise ConfigError(
                f"has a tensor that is neither parameter nor buffer, {name}",
                where=tensors.path,
                fix="Register it: self.register_buffer(name, tensor).",
            )
    left = [name for name in tensors.shapes() if name not in taken]
    if left:
        raise ConfigError(
            f"its forward pass reads nothing of {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}",
            where=tensors.path,
            fix="Leave them out of the model, or use them.",
        )
    return total


def open_parts(
    models: Iterable[bytes], path: Path, options: ort.SessionOptions, fold: bool = True
) -> list[ort.InferenceSession]:
    """Sessions of graphs made of the one at `path`, serialized, whose weights lie beside it. ONNX Runtime prints nothing.

    Unless they `fold` constants, weights that a body makes wide are so only while they multiply.
    """
    folder = str(data_file(path).resolve().parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    options.log_severity_level = SILENT
    with silenced():
        return [
            ort.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[] if fold else ["ConstantFolding"],
            )
            for model in models
        ]


def cache_scales_by_name(scales: Sequence[Scales]) -> dict[str, Tensor]:
    """The scales of a quantized cache, of each layer, by the names they have in a graph."""
    return {
        scale_name(layer, part): scale
        for layer, pair in enumerate(scales)
        for part, scale in zip(SCALES, pair, strict=True)
    }


def _reader(
    tensors: Tensors, name: str, recipe: WeightRecipe, dtype: torch.dtype, allow_nan: bool
) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        tensor = recipe.make(lambda source: checked(tensors, source, dtype, allow_nan))
        return TorchTensor(tensor, name=name)

    return read


def checked(tensors: Tensors, name: str, dtype: torch.dtype, allow_nan: bool) -> Tensor:
    """One tensor in `dtype`.

    Raises:
        CheckpointError: it holds NaN or infinity, or a value `dtype` cannot hold, and `allow_nan` is not set.
    """
    source = tensors.read(name)
    tensor = source.to(dtype)
    if not allow_nan:
        check_held(
            source,
            tensor,
            where=tensors.path,
            name=name,
            if_nan="The checkpoint is damaged or training diverged; --allow-nan exports it all the same.",
            if_large="Export with --dtype bfloat16 or float32.",
        )
    return tensor


def check_held(source: Tensor, tensor: Tensor, *, where: Path, name: str, if_nan: str, if_large: str) -> None:
    """Refuse a weight `source` that is not finite in the dtype it was cast to, as `tensor`.

    Raises:
        CheckpointError: it is not; `if_nan` and `if_large` say what helps where it never was, and where the dtype cannot hold it.
    """
    if _finite(tensor):
        return
    if not _finite(source):
        raise CheckpointError(f"tensor {name} holds NaN or infinity", where=where, fix=if_nan)
    kind = str(tensor.dtype).removeprefix("torch.")
    largest = source.abs().max().item()
    raise CheckpointError(
        f"tensor {name} has values up to {largest:.3g}, more than {kind} holds", where=where, fix=if_large
    )


def let_go(value: ir.Value) -> None:
    """Close the file that an initializer which nobody holds any more was read from: mapped, what was read of it stays in memory."""
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()


def _finite(tensor: Tensor) -> bool:
    """Whether all of it is; looked at in parts, since torch takes as much memory again as it looks at."""
    parts = torch.split(tensor.reshape(-1), _AT_ONCE)
    if tensor.dtype == torch.float8_e4m3fn:  # of which torch cannot say it
        return all(bool(part.float().isfinite().all()) for part in parts)
    return all(bool(part.isfinite().all()) for part in parts)


def save_model(model: ir.Model, path: Path, on_tensor: Callable[[str, int], None]) -> None:
    """Write the graph to `path` and its weights beside it as `<name>.data`, reading them one by one.

    `on_tensor` is told the name and bytes of each tensor before it is written.
    """

    def callback(tensor: ir.TensorProtocol, _: object) -> None:
        on_tensor(tensor.name or "", tensor.nbytes)

    try:
        ir.save(model, path, external_data=data_file(path).name, size_threshold_bytes=_INLINE, callback=callback)
    except ir.serde.SerdeError as error:  # wraps what reading a small tensor raised, once per level of the graph
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HeadfoldError):
            cause = cause.__cause__
        raise cause or error from None


def load_model(path: Path) -> ir.Model:
    """A graph that `save_model` wrote, its weights in the file where they are: onnx-ir follows no link, as a hub's cache has them.

    Raises:
        BundleError: it is no graph, or its weights are not where it says.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # of protobuf, onnx and onnx-ir, which share no base
        raise BundleError(f"onnx cannot load it: {error}", where=path, fix="Export it again.") from error
    beside = data_file(path)
    weights, linked = beside.resolve(), beside.is_symlink()
    length = weights.stat().st_size if weights.is_file() else 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.location != beside.name or (tensor.offset or 0) + tensor.nbytes > length:
            raise BundleError(
                f"{beside.name} does not hold {value.name}",
                where=path,
                fix="Export it again, or copy it anew.",
            )
        if linked:
            value.const_value = ir.ExternalTensor(
                weights.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                metadata_props=tensor.metadata_props,
                base_dir=weights.parent,
            )
    return model


def data_file(path: Path) -> Path:
    """Where the weights of the graph at `path` are; it may be a link."""
    return path.with_name(f"{path.name}.data")
