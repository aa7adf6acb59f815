"""Convert a checkpoint: calibrate layer by layer, convert each, fit its output anew, and tell what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headfold.export.checkpoints.base import Checkpoint, MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_own
from headfold.export.conversion.ffn import plain_to_gated
from headfold.export.conversion.heads import NEED_STATISTICS
from headfold.export.conversion.layers import ConvertOptions, Tensors, attention_prefix, convert_layer, converted_config
from headfold.export.conversion.refit import refit
from headfold.export.conversion.statistics import moments
from headfold.export.conversion.streams import Streams
from headfold.export.data.calibration import LENGTH, MOST_TOKENS, TOKENS, calibration_tokens
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Attention, Decoder
from headfold.export.progress import Reporter
from headfold.export.publishing import check_free
from headfold.runtime.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on: sources as `headfold.export.data.documents.pieces` takes them, none for text that the model writes itself;
    how many tokens, in sequences of how many.
    """

    data: Sequence[str] = ()
    tokens: int = TOKENS
    length: int = LENGTH

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("length", 2)):
            if not least <= getattr(self, name) <= MOST_TOKENS:
                fix = f"It must be {least} to {MOST_TOKENS:,}."
                raise InputError(f"calibration {name} is {getattr(self, name)}", fix=fix)


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, and what each layer's conversion cost."""

    checkpoint: MemoryCheckpoint
    errors: tuple[
        float, ...
    ]  # relative squared error of attention's output, each layer by itself, before outputs are fitted anew
    tokens: int  # calibrated on
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kv_heads": self.checkpoint.config.num_key_value_heads,
            "calibration_tokens": self.tokens,
            "layer_errors": list(self.errors),
            "mean_error": sum(self.errors) / len(self.errors),
            "notes": list(self.notes),
        }


def convert_checkpoint(
    checkpoint: Checkpoint, options: ConvertOptions, tokens: Tensor, reporter: Reporter, decoder: Decoder | None = None
) -> Conversion:
    """Convert a checkpoint, calibrated on int64 tokens [N, S]; `decoder`, if it is loaded already, saves reading it again.

    Layer by layer, as `convert` does; with `svd` each layer's output projection is then fitted once more, on what the converted
    model really computes up to there: see `refit`.

    Raises:
        ConfigError: see `converted_config`.
    """
    config, target = checkpoint.config, converted_config(checkpoint.config, options)
    decoder = decoder or load_decoder(checkpoint)
    tensors, errors = {name: checkpoint.read(name) for name in checkpoint}, []
    with reporter.step(
        f"convert {config.num_key_value_heads} key/value heads to {target.num_key_value_heads}"
    ) as advance:
        streams = Streams(decoder, tokens)
        for layer in range(config.num_hidden_layers):
            prefix = attention_prefix(layer)
            part = {n.removeprefix(prefix): tensors[n].double() for n in tensors if n.startswith(prefix)}
            statistics = moments(streams) if options.needs_statistics else None
            part = convert_layer(part, config, options, statistics, layer)
            converted = _attention(part, target, layer)
            errors.append(streams.error(converted))
            if options.init == "svd":
                part["o_proj.weight"] = refit(streams, converted)
                converted = _attention(part, target, layer)
            tensors |= {prefix + name: value.to(tensors[prefix + name].dtype) for name, value in part.items()}
            streams.advance(converted)
            advance(1)
    result = MemoryCheckpoint(checkpoint.path, target, tensors, checkpoint.tokenizer)
    return Conversion(result, tuple(errors), tokens.numel(), _notes(config, options))


def _attention(part: Tensors, config: ModelConfig, layer: int) -> Attention:
    """A float32 module with these weights."""
    with torch.device("meta"):
        attention = Attention(config, layer)
    attention.load_state_dict({name: tensor.float() for name, tensor in part.items()}, assign=True)
    return attention.requires_grad_(False)


def _notes(config: ModelConfig, options: ConvertOptions) -> tuple[str, ...]:
    if config.qk_norm and options.init in NEED_STATISTICS:
        return (
            "q/k norm: keys can only be aligned by signs, so their merge is a weighted mean; values are not affected",
        )
    return ()


def convert_file(
    source: Path,
    output: Path,
    options: ConvertOptions | None,
    calibration: Calibration,
    reporter: Reporter,
    dtype: torch.dtype | None = None,
    feed_forward: str | None = None,
) -> Conversion | None:
    """Convert the checkpoint at `source` into a new Hugging Face directory at `output`, complete or not at all.

    Args:
        source: see `open_own`.
        output: must not exist.
        options: of the heads; None leaves them.
        calibration: what to calibrate on.
        reporter: told what goes on.
        dtype: of the written weights. [default: the source's]
        feed_forward: also turn a plain feed-forward into this gated one; see `plain_to_gated`.

    Returns:
        What the conversion of the heads cost; None if they were left.

    Raises:
        HeadfoldError: nothing to do, bad input, or `output` exists.
    """
    if options is None and feed_forward is None:
        raise InputError("nothing to convert", fix="Give --kv-heads, --ffn, or both.")
    check_free(output, CheckpointError)
    checkpoint = open_own(source)
    stored = dtype or checkpoint.dtype("model.embed_tokens.weight")
    conversion = None
    if options is not None:
        converted_config(checkpoint.config, options)  # before anything is read
        if options.kv_heads == checkpoint.config.num_key_value_heads and options.init != "random":
            raise InputError(
                f"it has {options.kv_heads} key/value heads already",
                where="--kv-heads",
                fix="Give a smaller number, or take the checkpoint as it is.",
            )
        with reporter.step("read the checkpoint"):
            decoder = load_decoder(checkpoint)
        tokens = calibration_tokens(
            checkpoint.tokenizer.definition,
            decoder,
            calibration.data,
            calibration.tokens,
            calibration.length,
            options.seed,
            reporter,
        )
        conversion = convert_checkpoint(checkpoint, options, tokens, reporter, decoder)
        checkpoint = conversion.checkpoint
    if feed_forward is not None:
        config, tensors = plain_to_gated(
            checkpoint.config, {name: checkpoint.read(name) for name in checkpoint}, feed_forward
        )
        checkpoint = MemoryCheckpoint(source, config, tensors, checkpoint.tokenizer)
    with reporter.step(f"write {output}"):
        save_hf(output, checkpoint, stored)
    return conversion


def render(conversion: Conversion, console: Console) -> None:
    """The error of each layer as a table."""
    table = Table(
        "layer", "error", title=f"relative output error of attention, {conversion.tokens:,} calibration tokens"
    )
    for layer, error in enumerate(conversion.errors):
        table.add_row(str(layer), f"{error:.4f}")
    table.add_row("mean", f"{sum(conversion.errors) / len(conversion.errors):.4f}")
    console.print(table)
    for note in conversion.notes:
        console.print(note, markup=False)
