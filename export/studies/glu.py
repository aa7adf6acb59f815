"""Shazeer 2020's comparison of feed-forwards at small scale: eight variants, equal parameters, same data, several seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headfold.export.data.documents import pieces
from headfold.export.data.token_data import TokenData
from headfold.export.model.config import FEED_FORWARDS, ModelConfig
from headfold.export.model.initialize import new_decoder
from headfold.export.progress import Reporter
from headfold.export.training.loop import train
from headfold.export.training.options import TrainOptions
from headfold.runtime.errors import DataError, InputError

_END, VOCABULARY = 256, 257  # a token per byte, and one that ends a document


@dataclass(frozen=True)
class GluOptions:
    """The model and how often it is trained. `intermediate_size` is that of the plain variants: a multiple of 3."""

    hidden_size: int = 64
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    seeds: int = 3
    variants: tuple[str, ...] = tuple(FEED_FORWARDS)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}", fix="It must be 1 or more; 2 or more give standard deviations.")
        if self.intermediate_size % 3 or self.intermediate_size < 3:
            raise InputError(
                f"d-ff is {self.intermediate_size}", fix="Two thirds of it must be whole: choose a multiple of 3."
            )
        if unknown := [name for name in self.variants if name not in FEED_FORWARDS]:
            raise InputError(f"feed-forward {unknown[0]!r} is unknown", fix=f"Choose among {', '.join(FEED_FORWARDS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden size {self.hidden_size} is not divisible by {self.num_attention_heads} heads",
                fix="Change one.",
            )


@dataclass(frozen=True)
class Row:
    """A variant: held-out log-perplexity (nats per byte) of each seed, after an eighth of the training and after all of it."""

    name: str
    intermediate_size: int
    parameters: int
    early: tuple[float, ...]
    final: tuple[float, ...]


@dataclass(frozen=True)
class GluStudy:
    """The whole table."""

    early_steps: int
    steps: int
    options: GluOptions
    training: TrainOptions
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def glu_config(name: str, options: GluOptions, positions: int) -> ModelConfig:
    """The study's model with one feed-forward; gated ones get two thirds of the width (Shazeer 2020, section 3.1), since they have
    three matrices instead of two.
    """
    act, gated = FEED_FORWARDS[name]
    return ModelConfig(
        model_type="headfold",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size * 2 // 3 if gated else options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_attention_heads,
        head_dim=options.hidden_size // options.num_attention_heads,
        max_position_embeddings=positions,
        hidden_act=act,
        gated=gated,
        eos_token_id=(_END,),
    )


def study_glu(
    data: TokenData, validation: TokenData, training: TrainOptions, options: GluOptions, reporter: Reporter
) -> GluStudy:
    """Train every variant with every seed. A seed decides the initial weights and the order of the data, alike for all variants.

    Raises:
        HeadfoldError: see `train`.
    """
    early = max(training.steps // 8, 1)
    training = replace(training, evaluate_every=early)
    rows = []
    with reporter.step(
        f"train {len(options.variants)} variants x {options.seeds} seeds", len(options.variants)
    ) as advance:
        for name in options.variants:
            config = glu_config(name, options, training.sequence)
            curves, count = [], 0
            for seed in range(options.seeds):
                decoder = new_decoder(config, seed)
                count = sum(parameter.numel() for parameter in decoder.parameters())
                result = train(decoder, data, replace(training, seed=training.seed + seed), validation=validation)
                curves.append({evaluation.step: evaluation.loss for evaluation in result.evaluations})
            first, last = (tuple(curve[step] for curve in curves) for step in (early, training.steps))
            rows.append(Row(name, config.intermediate_size, count, first, last))
            reporter.note(f"{name}: {_cell(first)} after {early} steps, {_cell(last)} after {training.steps}")
            advance(1)
    return GluStudy(early, training.steps, options, training, tuple(rows))


def byte_tokens(sources: Sequence[str], text_field: str) -> TokenData:
    """The sources' UTF-8 bytes as tokens, and 256 after each document.

    Raises:
        DataError: see `pieces`; or there is no text.
    """
    parts = [
        np.array([*piece.text.encode(), *([_END] if piece.last else [])], np.uint16)
        for source in sources
        for piece in pieces(source, text_field)
    ]
    if not parts:
        raise DataError("has no text", where=", ".join(sources), fix="Name data with some.")
    return TokenData.from_ids(np.concatenate(parts))


def render(study: GluStudy, console: Console) -> None:
    """The table, like table 1 of Shazeer 2020; the lowest mean of each column is bold."""
    table = Table(box=None, pad_edge=False, title="held-out log-perplexity, nats per byte, mean ± standard deviation")
    for column in ("feed-forward", "d_ff", "parameters", f"{study.early_steps:,} steps", f"{study.steps:,} steps"):
        table.add_column(column, justify="left" if column == "feed-forward" else "right")
    best = [min(statistics.mean(getattr(row, name)) for row in study.rows) for name in ("early", "final")]
    for row in study.rows:
        cells = [
            f"[bold]{_cell(values)}[/bold]" if statistics.mean(values) == lowest else _cell(values)
            for values, lowest in zip((row.early, row.final), best, strict=True)
        ]
        table.add_row(row.name, str(row.intermediate_size), f"{row.parameters:,}", *cells)
    console.print(table)


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
