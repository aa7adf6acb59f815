"""Ahead of time: model definition, checkpoints, ONNX export, parity, bundles and the command line.

For a model that is in memory, `from headfold.export import ModuleFacts, export_module, verify_module`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headfold.export.bundle.modules import export_module, verify_module
    from headfold.export.bundle.pipeline import ExportOptions
    from headfold.export.exportables.module_road.module_model import ModuleFacts

__all__ = ["ExportOptions", "ModuleFacts", "export_module", "verify_module"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from headfold.export.bundle import modules  # here, for it imports torch

    return getattr(modules, name)
