"""A model that is in memory becomes a bundle: one of transformers, or a person's own module that attends through headfold's op."""

from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import nn

from headfold.export.bundle.pipeline import ExportOptions, ExportResult, export_bundle
from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.checkpoints.side_files import side_files
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.facts import Facts
from headfold.export.exportables.module_road.module_model import ModuleFacts, ModuleModel
from headfold.export.parity.report import ParityReport
from headfold.export.parity.verify import verify
from headfold.export.progress import Reporter
from headfold.runtime.errors import CheckpointError, ConfigError
from headfold.runtime.manifest import Manifest

_QUIET = Reporter(quiet=True)


def export_module(
    module: nn.Module,
    output: str | PathLike[str],
    facts: ModuleFacts | None = None,
    *,
    tokenizer: str | PathLike[str] | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008  # frozen
    reporter: Reporter = _QUIET,
) -> ExportResult:
    """Export a model that is in memory to a new bundle at `output`, and prove it equal to the model. The model stays as it is.

    A module of your own is called as `forward(input_ids, positions, cache)`, ids and positions int64 [B, S], and returns logits
    [B, S, vocabulary]. Its layers are one list; each returns the residual stream [B, S, hidden], and calls
    `headfold.plugins.torch.attention(q, k, v, cache, layer)` once. Positions are for RoPE, or a table of them. Parameters take
    the bundle's dtype, buffers keep theirs.

    Args:
        module: that, or a causal language model of transformers, adapters merged.
        output: directory of the bundle.
        facts: what a module of your own does not tell; transformers' models have it in their configuration.
        tokenizer: a directory with `tokenizer.json` and, if there are any, a chat template and generation settings.
        options: dtype, capacity and so on.
        reporter: is told what goes on.

    Raises:
        HeadfoldError: it cannot be exported; which submodule, and why, is named.
        VerificationError: the graph does not compute what the model computes; no bundle is written.
    """
    if not isinstance(options, ExportOptions):
        raise ConfigError(f"is a {type(options).__name__}", where="options", fix="Give ExportOptions(...).")
    return export_bundle(_exportable(module, facts, _files(tokenizer)), Path(output), options, reporter)


def verify_module(
    bundle: str | PathLike[str], module: nn.Module, *, decode_steps: int = 16, reporter: Reporter = _QUIET
) -> ParityReport:
    """Compare a finished bundle with the model in memory that it was made of; see its `passed`.

    Raises:
        BundleError: the bundle is damaged, or was made of another model.
        ConfigError: the model cannot be exported.
    """

    def opened(manifest: Manifest) -> Exportable:
        if manifest.road != "module":
            return _exportable(module, None, TokenizerFiles())
        told = Facts.from_json(manifest.config)
        facts = ModuleFacts(
            max_position_embeddings=told.capacity,
            bos_token_id=told.bos_token_id,
            eos_token_id=told.eos_token_id,
            pad_token_id=told.pad_token_id,
        )
        return _exportable(module, facts, TokenizerFiles())

    return verify(Path(bundle), opened, decode_steps, reporter)


def _exportable(module: nn.Module, facts: ModuleFacts | None, tokenizer: TokenizerFiles) -> Exportable:
    kinds, name = {kind.__name__ for kind in type(module).__mro__}, type(module).__name__
    if "PeftModel" in kinds:
        raise ConfigError(
            "has an adapter that is not merged", where=name, fix="Give what its merge_and_unload() returns."
        )
    if "PreTrainedModel" not in kinds:
        if facts is None:
            raise ConfigError(
                "does not tell how many tokens it was made for",
                where=name,
                fix="Give facts=ModuleFacts(max_position_embeddings=...).",
            )
        if not isinstance(facts, ModuleFacts):
            raise ConfigError(f"is a {type(facts).__name__}", where="facts", fix="Give ModuleFacts(...).")
        return ModuleModel(module, facts, tokenizer)
    if facts is not None:
        raise ConfigError(
            "is a model of transformers, whose configuration has its facts", where=name, fix="Give no facts."
        )
    from headfold.export.exportables.transformers_road.in_memory import transformers_in_memory

    return transformers_in_memory(cast(Any, module), name, tokenizer)


def _files(directory: str | PathLike[str] | None) -> TokenizerFiles:
    if directory is None:
        return TokenizerFiles()
    files = side_files(Path(directory))
    if "tokenizer.json" not in files:
        raise CheckpointError("has no tokenizer.json", where=directory, fix="Save the tokenizer there.")
    return TokenizerFiles(files)
