"""`headfold score` and `headfold lm-eval`: how well a bundle predicts."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from headfold.export.cli.shared import BUNDLE, JSON, print_json
from headfold.export.cli.using.opening import Engine, engine_options, open_bundle
from headfold.plugins.attention.schema import Attention

if TYPE_CHECKING:
    from headfold.runtime import Model

_CONTEXT = 2048  # tokens of a window, unless the bundle's capacity is less


@click.command()
@BUNDLE
@click.option("--data", required=True, help="Text: .txt, .md, .jsonl, .parquet, a directory of these, or a data set.")
@click.option("--text-field", "--field", "field", default="text", show_default=True, help="Column of the text.")
@click.option("--context", type=click.IntRange(2), help="Tokens of a window. [default: 2048, or the capacity]")
@click.option("--tokens", type=click.IntRange(1), help="Predict that many tokens at most. [default: all]")
@engine_options
@JSON
def score(
    bundle: Path,
    data: str,
    field: str,
    context: int | None,
    tokens: int | None,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Tell a bundle's perplexity on text of yours. Bundles exported with --all-logits are much faster at it.

    **Example**: `headfold score smol --data corpus.txt --tokens 10000`
    """
    from headfold.runtime.measuring.scoring import perplexity

    model = open_bundle(bundle, backend, provider, attention, threads)
    window = min(_CONTEXT, model.capacity) if context is None else context
    found = perplexity(model.score, _documents(model, data, field), window, tokens)
    if as_json:
        print_json({**vars(found), "perplexity": found.perplexity, "context": window})
    else:
        click.echo(
            f"perplexity {found.perplexity:.4f} ({found.nats:.5f} nats per token), {found.tokens:,} tokens "
            f"of {found.documents:,} documents, windows of {window:,}"
        )


def _documents(model: "Model", data: str, field: str) -> Iterator[Iterator[int]]:
    """The tokens of each document; the tokenizer's special ones go where a document begins."""
    from headfold.export.data.documents import Piece, pieces

    left = pieces(data, field)

    def tokens(piece: Piece | None) -> Iterator[int]:
        first = True
        while piece is not None:
            yield from model.tokenizer.encode(piece.text, add_special_tokens=first).ids
            first, piece = False, None if piece.last else next(left, None)

    while (piece := next(left, None)) is not None:
        document = tokens(piece)
        yield document
        for _ in document:  # what was not asked for: the next piece is another document's
            pass


@click.command("lm-eval", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command, whose `--model headfold` is a bundle. See its options with `headfold lm-eval run -- --help`.

    **Example**: `headfold lm-eval run --model headfold --model_args bundle=smol --tasks lambada_openai`
    """
    from lm_eval.__main__ import cli_evaluate

    import headfold.runtime.measuring.lm_eval_model  # noqa: F401  # registers it

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
