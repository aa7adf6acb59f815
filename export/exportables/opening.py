"""Which road a checkpoint takes: its family's own table, or transformers. Said in one line where it is not the first."""

from importlib.util import find_spec
from pathlib import Path

from headfold.export.checkpoints.families import FAMILIES, OWN
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.checkpoints.side_files import CONFIG, read_json
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.progress import Reporter
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import Road


def open_exportable(
    path: Path, via: Road | None = None, trust_remote_code: bool = False, reporter: Reporter | None = None
) -> Exportable:
    """Open a checkpoint for export: a GGUF file, a Hugging Face directory, or `organisation/name` on its hub.

    Args:
        path: of the checkpoint.
        via: the road; by default headfold's own where it has a table of the family, otherwise transformers.
        trust_remote_code: let transformers run code that lies beside the weights.
        reporter: is told which road it is, if that is not headfold's own.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the model is not one that can be exported.
    """
    if via == "module":
        raise ConfigError(
            "holds no code of the module that the bundle was made of",
            where=path,
            fix="Compare it in Python: headfold.export.verify_module(bundle, module).",
        )
    model_type = read_json(path / CONFIG).get("model_type") if path.is_dir() else None
    if via is None:
        via = "transformers" if isinstance(model_type, str) and model_type not in {*FAMILIES, OWN} else "headfold"
    if via == "headfold":
        return OwnModel(open_checkpoint(path))
    if find_spec("transformers") is None:
        raise ConfigError(
            f"model_type {model_type!r} is none of headfold's own ({', '.join(FAMILIES)}), and transformers is not installed",
            where=path,
            fix="Install it: pip install 'headfold[transformers]'.",
        )
    from headfold.export.exportables.transformers_road.transformers_model import open_transformers

    exportable = open_transformers(path, trust_remote_code)
    if reporter is not None:
        reporter.note(f"{exportable.facts.model_type}: by way of transformers")
    return exportable
