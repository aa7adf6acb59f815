"""RMSNorm that a model spells out becomes the standard operator, by onnxscript's own rules: one kernel in place of six or eight."""

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from headfold.export.graph.recipes import recipe_of


def fold_norms(model: ir.Model) -> int:
    """Returns how many there were. A graph without spelled-out means is left as it is."""
    if not any(node.op_type == "ReduceMean" for node in model.graph):
        return 0
    weights = {value: value.const_value for value in model.graph.initializers.values() if recipe_of(value) is not None}
    for value in weights:
        value.const_value = None  # there is none to fold yet
    fold_constants(model)  # the rules want the axes as numbers
    count = int(fuse_rms_normalization(model))
    for value, tensor in weights.items():
        value.const_value = tensor
    common_passes.RemoveUnusedNodesPass()(model)
    return count
