"""From an Exportable to the master ONNX graph: torch traces its module on meta tensors, so no weight is in memory.

The graph's initializers are named like the module's tensors and have no values yet; `weights.py` fills them while saving.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import opset23 as op
from torch import Tensor
from torch.onnx import OnnxExporterError

import headfold.plugins.experts.torch_op  # noqa: F401  # registers the op that the table below names
from headfold.export.exportables.base import Exportable, Tensors, first_names
from headfold.export.graph.bodies import onnxruntime_can, use_experts_bodies, use_onnxruntime_body, use_standard_body
from headfold.export.graph.experts import alternate_experts
from headfold.export.graph.joining import join_projections, pack_inputs
from headfold.export.graph.norms import fold_norms
from headfold.export.graph.passes import fold_transposes, name_weights, share_last_index, split_at_once
from headfold.export.graph.reshapes import drop_idle_reshapes
from headfold.export.graph.rotation import fold_rotations
from headfold.plugins.attention.onnx_functions import schema
from headfold.plugins.attention.schema import ALL_INPUTS, DOMAIN, LAST_INDEX, OP_TYPE, VERSION, AttentionInputs
from headfold.plugins.dtypes import Quantized
from headfold.plugins.experts import onnx_functions as experts_body
from headfold.plugins.experts import schema as experts_schema
from headfold.plugins.names import HIDDEN_STATES, caches, hidden_state
from headfold.plugins.onnx_body import OPSET
from headfold.runtime.errors import ConfigError, HeadfoldError

IR_VERSION = 11  # of ONNX 1.18: the first with opset 23 and later, and what onnxruntime 1.31 reads


def export_graph(
    exportable: Exportable,
    tensors: Tensors,
    dtype: torch.dtype,
    capacity: int,
    all_logits: bool = False,
    cache: Quantized | None = None,
    hidden_states: bool = False,
) -> ir.Model:
    """Trace a model into the master graph.

    Inputs: `input_ids` int64 [batch, sequence]; `attention_mask` int64 [batch, total], 1 for tokens and 0 for padding on either
    side, its last columns belong to `input_ids`; `past_key_values.{i}.key|value` [batch, Hkv, capacity, D]. Outputs: `logits`
    [batch, 1, vocab] of each row's last real token (with `all_logits` [batch, sequence, vocab]) and `present.{i}.key|value`,
    which alias the inputs where the runtime can; with `hidden_states` also `hidden_states` [batch, sequence, hidden], what the head is
    given of every token. The residual stream after layer i is the value `hidden_states.{i}`.

    Args:
        exportable: the model.
        tensors: its weights, opened; none is read but the frequencies of a rotation that the model spells out.
        dtype: of weights, cache and logits.
        capacity: positions the rotary tables cover; the size of the cache itself is dynamic.
        all_logits: see above.
        cache: dtype of a quantized cache; None for `dtype`. Its scales are initializers as the weights are.
        hidden_states: see above.

    Raises:
        ConfigError: the model cannot be traced, or cannot have that cache.
    """
    stored = getattr(torch, cache) if cache is not None else dtype
    master = exportable.master(dtype, capacity, all_logits, cache)
    master.hidden_states = hidden_states
    shapes = exportable.facts.cache_shapes
    with torch.device("meta"):  # sizes to trace with, all different
        pasts = [
            (torch.empty((2, heads, 11, head_dim), dtype=stored), torch.empty((2, heads, 11, head_dim), dtype=stored))
            for heads, head_dim in shapes
        ]
        args = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), pasts)
    batch, sequence, total, room = (
        torch.export.Dim(n, min=1, max=2**31 - 1) for n in ("batch", "sequence", "total", "capacity")
    )
    layers = range(len(shapes))
    kv = caches(len(shapes))
    with _quiet(), _one_line(exportable.path):
        program = torch.onnx.export(
            master,
            args,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=["input_ids", "attention_mask", *kv],
            output_names=[
                "logits",
                *kv.values(),
                *map(hidden_state, layers),
                *([HIDDEN_STATES] if hidden_states else []),
            ],
            dynamic_shapes=(
                {0: batch, 1: sequence},
                {0: batch, 1: total},
                [({0: batch, 2: room}, {0: batch, 2: room}) for _ in layers],
            ),
            custom_translation_table={
                torch.ops.headfold.GroupedQueryAttention.default: _attention_node,
                torch.ops.headfold.MixtureOfExperts.default: _experts_node,
                torch.ops.headfold.RMSNormalization.default: _norm_node,
            },
        )
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "headfold", ""
    streams = 1 + len(kv)
    del model.graph.outputs[streams : streams + len(shapes)]  # the residual stream: named values, not outputs
    name_weights(model, prefix="decoder.", tied=first_names(master.decoder))
    fold_transposes(model)
    split_at_once(model)
    if (
        dtype == torch.float32
    ):  # in 16 bits models cast in between, and the rules would lose the casts: it stays spelled out
        fold_rotations(model, tensors.read, capacity)
        fold_norms(model)
    drop_idle_reshapes(model)
    join_projections(model)
    ir.passes.Sequential(
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.IdentityEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.ClearMetadataAndDocStringPass(),
    )(model)
    share_last_index(model)
    alternate_experts(model)
    use_experts_bodies(model)
    if onnxruntime_can(model):
        pack_inputs(model)
        use_onnxruntime_body(model)
    else:
        use_standard_body(model)
    return model


_LAST = ALL_INPUTS.index(LAST_INDEX)
_OP = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), OP_TYPE, schema())


def _attention_node(*tensors: ir.Value | None, **attributes: float) -> object:
    """Translate the torch op, which has all inputs but the last index: one node of the same name."""
    inputs = AttentionInputs.of_node([*tensors[:_LAST], None, *tensors[_LAST:]])
    total = op.Cast(inputs.total_sequence_length, to=onnx.TensorProto.INT32)
    values = [total if name == "total_sequence_length" else getattr(inputs, name) for name in ALL_INPUTS]
    while values[-1] is None:
        values.pop()
    return _OP(*values, **attributes)


_EXPERTS = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), experts_schema.OP_TYPE, experts_body.schema())


def _experts_node(*tensors: ir.Value | None, **attributes: float | str) -> object:
    """The torch op has the node's inputs and attributes."""
    count = len(tensors) if tensors[-1] is not None else len(tensors) - 2  # both biases or neither
    return _EXPERTS(*tensors[:count], **attributes)


def _norm_node(x: Tensor, weight: Tensor, epsilon: float) -> object:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """The exporter's pages on why it fails, as a line of what failed first."""
    try:
        yield
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, HeadfoldError):
            cause = cause.__cause__
        if isinstance(cause, HeadfoldError):
            raise cause from error
        first = (str(cause).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"torch cannot export it as one graph: {type(cause).__name__}: {first}",
            where=path,
            fix="Make its forward pass the same operations for every batch, length and value.",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs that torchvision is missing and warns about its own internals."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
