"""`headfold generate` and `headfold chat`: a bundle at work."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from headfold.export.cli.shared import BUNDLE, JSON, NUMBER, Command, options, print_json, refuse_idle
from headfold.export.cli.using.opening import DRAFT, ENGINE, PREFILL, Engine, open_bundle
from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import CapacityError, InputError
from headfold.runtime.files.json_file import SETTINGS_BYTES, check_size, read_object

if TYPE_CHECKING:
    from headfold.runtime import Model
    from headfold.runtime.scheduling.answers import Answers

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def _sampling(command: Command) -> Command:
    """The options that `generate` and `chat` share."""
    return options(
        command,
        click.option("-n", "--max-new-tokens", type=click.IntRange(1), help="[default: 256, or what fits]"),
        click.option("--temperature", type=NUMBER, help="0 is greedy. [default: the bundle's]"),
        click.option("--top-k", type=int, help="Sample from that many likeliest tokens."),
        click.option(
            "--top-p", type=NUMBER, help="Sample from the likeliest tokens that have this probability together."
        ),
        click.option("--min-p", type=NUMBER, help="Sample from tokens at least this share as likely as the likeliest."),
        click.option("--repetition-penalty", type=NUMBER, help="Above 1: tokens that were there become less likely."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option(
            "--speculate",
            is_flag=True,
            default=None,
            help="Guess from the text so far; needs --all-logits. Same answers, sooner.",
        ),
        DRAFT,
        PREFILL,
        *ENGINE,
    )


def _load(
    bundle: Path,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
    temperature: float | None,
    draft: Path | None,
    prefill: Path | None,
) -> "Model":
    """The bundle at work; what has no effect on it is refused."""
    model = open_bundle(bundle, backend, provider, attention, threads, draft=draft, prefill=prefill)
    refuse_idle(
        (model.temperature if temperature is None else temperature) == 0,
        *("top_k", "top_p", "min_p", "seed"),
        why="is of sampling, and this is greedy",
        fix="Add --temperature 0.7, or leave it out.",
    )
    return model


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no text: {error}", fix="Give it as UTF-8.") from error


@click.command()
@BUNDLE
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--chat", is_flag=True, help="Wrap each prompt in the chat template as a user's message.")
@click.option("--system", help="System message; implies --chat.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@click.option("--json-schema", type=_FILE, help="Answer with JSON of the schema in this file.")
@click.option("--grammar", type=_FILE, help="Answer as the Lark grammar in this file says.")
@_sampling
@JSON
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    json_schema: Path | None,
    grammar: Path | None,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
    draft: Path | None,
    prefill: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue each PROMPT, or answer it with --chat; `-` or none reads one prompt from standard input.

    **Examples**

    `headfold generate smol "The capital of France is" -n 20`

    `headfold generate smol --chat "Why is the sky blue?" --temperature 0.7 --seed 1`
    """
    model = _load(bundle, backend, provider, attention, threads, sampling["temperature"], draft, prefill)
    texts = [_standard_input() if text == "-" else text for text in prompts or ("-",)]
    if any(not text for text in texts):
        raise InputError("the prompt is empty", fix="Give some text.")
    batch: list[Any] = list(texts)
    if chat or system:
        head = [{"role": "system", "content": system}] if system else []
        batch = [[*head, {"role": "user", "content": text}] for text in texts]
    arguments = {"stop": stop or None, **sampling}
    if json_schema is not None:
        arguments["json_schema"] = read_object(json_schema, SETTINGS_BYTES, InputError, "Give a JSON schema.")
    if grammar is not None:
        check_size(grammar, SETTINGS_BYTES, InputError, "Give a grammar.")
        arguments["grammar"] = grammar.read_bytes().decode(errors="replace")
    if as_json:
        print_json([vars(generation) for generation in model.generate(batch, **arguments)])
    elif len(batch) == 1:
        for delta in model.generate(batch[0], stream=True, **arguments):
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
        click.echo()
    else:
        for text, generation in zip(texts, model.generate(batch, **arguments), strict=True):
            click.echo(f"> {text}\n{generation.text}\n")


@click.command()
@BUNDLE
@click.option("--system", help="System message.")
@_sampling
def chat(
    bundle: Path,
    system: str | None,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
    draft: Path | None,
    prefill: Path | None,
    **sampling: Any,
) -> None:
    """Talk with the model; an empty line or Ctrl-D ends it.

    **Example**: `headfold chat smol --system "Answer in one sentence." --temperature 0.7`
    """
    model = _load(bundle, backend, provider, attention, threads, sampling["temperature"], draft, prefill)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            return
        messages.append({"role": "user", "content": question})
        answer = ""
        for delta in _answer(model, messages, sampling):
            answer += delta.text
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
        click.echo()
        messages.append({"role": "assistant", "content": answer})


def _answer(model: "Model", messages: list[dict[str, str]], sampling: dict[str, Any]) -> "Answers":
    """What the model says next. Of a conversation that no longer fits the oldest turns are left out, of `messages`, too."""
    first = 1 if messages[0]["role"] == "system" else 0
    while True:
        try:
            # With reuse a turn pays for what is new
            answers: Answers = model.generate(messages, stream=True, reuse=True, **sampling)
        except CapacityError:
            if len(messages) - first < 3:  # the question alone
                raise
            del messages[first : first + 2]
            click.echo("headfold: the conversation no longer fits: its oldest turn is left out", err=True)
        else:
            return answers
