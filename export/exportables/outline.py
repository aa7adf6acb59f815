"""The same model made smaller, to learn what its graph is made of: fewer layers, and no weight is read.

An outline has the first layers of a model, as many as it takes to have one of every kind, so its graph has the ops of the whole one's.
"""

from dataclasses import replace

import torch

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.model.config import ModelConfig


def outline(exportable: Exportable) -> Exportable:
    """Of a checkpoint by either road; weights are zeros. What is neither is given back as it is.

    Raises:
        ConfigError: it cannot be made.
    """
    if isinstance(exportable, OwnModel):
        return OwnModel(_own(exportable))
    if exportable.road == "transformers":
        from headfold.export.exportables.transformers_road.transformers_outline import transformers_outline

        return transformers_outline(exportable)
    return exportable


def _own(exportable: OwnModel) -> MemoryCheckpoint:
    config = _shortened(exportable.checkpoint.config)
    zeros = {
        name: torch.zeros(()).expand(shape) for name, shape in expected_shapes(config).items()
    }  # which take no memory
    return MemoryCheckpoint(exportable.path, config, zeros, exportable.tokenizer)


def _shortened(config: ModelConfig) -> ModelConfig:
    """Layers differ in their windows only."""
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    count = max(windows.index(window) for window in set(windows)) + 1
    sliding = tuple(layer for layer in config.sliding_layers if layer < count)
    return replace(config, num_hidden_layers=count, sliding_layers=sliding)
