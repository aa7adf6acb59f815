"""Which road a checkpoint takes: its family's own table, or transformers. Said in one line where it is not the first."""

from importlib.util import find_spec
from pathlib import Path

from headfold.export.checkpoints.directories.directory import Directory
from headfold.export.checkpoints.families import FAMILIES, OWN, NotInTable
from headfold.export.checkpoints.gguf.header import check_header
from headfold.export.checkpoints.opening import find, open_checkpoint
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.own import OwnModel
from headfold.export.progress import Reporter
from headfold.runtime.errors import ConfigError, InputError
from headfold.runtime.manifest import Road


def open_exportable(
    path: Path,
    via: Road | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
    base: Path | None = None,
) -> Exportable:
    """Open a checkpoint for export: a GGUF file, a Hugging Face directory or an adapter over one, or `organisation/name` on its hub.

    Args:
        path: of the checkpoint.
        via: the road; by default headfold's own where it has a table of the family and a place in it for what the configuration asks
            for, otherwise transformers.
        trust_remote_code: let transformers run code that lies beside the weights.
        reporter: is told which road it is, if that is not headfold's own.
        base: of an adapter, a directory or hub name; by default what it names itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the model is not one that can be exported.
        InputError: code is to be trusted, and none is run.
    """
    if via == "module":
        raise ConfigError(
            "holds no code of the module that the bundle was made of",
            where=path,
            fix="Compare it in Python: headfold.export.verify_module(bundle, module).",
        )
    path, why = find(path), None
    tables: set[str | None] = {*FAMILIES, OWN}
    model_type = Directory(path, base).config.get("model_type") if path.is_dir() else None
    if path.is_file():
        tables, model_type = {family.gguf for family in FAMILIES.values()}, check_header(path)
    known = not isinstance(model_type, str) or model_type in tables
    if via == "headfold" or (via is None and known):
        try:
            exportable = OwnModel(open_checkpoint(path, base))
        except NotInTable as error:
            if via is not None:
                raise
            why = error.what
        else:
            if trust_remote_code:
                raise InputError(
                    "headfold reads this family by its own table, and runs no code beside the weights",
                    where="--trust-remote-code",
                    fix="Leave it out, or add --via transformers.",
                )
            return exportable
    if find_spec("transformers") is None:
        unknown = f"model_type {model_type!r} is none of headfold's own ({', '.join(FAMILIES)})"
        raise ConfigError(
            f"{why or unknown}, and transformers is not installed",
            where=path,
            fix='Install it: pip install "headfold[transformers]".',
        )
    from headfold.export.exportables.transformers_road.gguf_model import open_gguf
    from headfold.export.exportables.transformers_road.transformers_model import open_transformers

    opened = open_gguf(path) if path.is_file() else open_transformers(path, trust_remote_code, base)
    if reporter is not None:
        reporter.note(f"{opened.facts.model_type}: by way of transformers{f', for {why}' if why else ''}")
    return opened
