"""Arguments, options and output that the commands share: the same names for the same things."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource
from click.types import FloatParamType

from headfold.plugins.dtypes import FLOATS
from headfold.runtime.errors import InputError

if TYPE_CHECKING:
    from headfold.export.progress import Reporter

Command = Callable[..., None]


class _Number(FloatParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return _finite(super().convert(value, param, ctx), self, param, ctx)


class Range(click.FloatRange):
    """A number from a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click.ParamType."""
        return _finite(super().convert(value, param, ctx), self, param, ctx)


def _finite(number: float, kind: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
    """NaN is in no range, but no comparison says so; and no JSON holds it, or infinity."""
    if not math.isfinite(number):
        kind.fail(f"{number} is no finite number.", param, ctx)
    return number


NUMBER = _Number()

SOURCE = click.argument("source", metavar="CHECKPOINT")
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
STEPS = click.option(
    "--decode-steps",
    type=click.IntRange(1, 512),
    default=16,
    show_default=True,
    help="Tokens decoded in the comparison.",
)
VIA = click.option(
    "--via",
    type=click.Choice(["headfold", "transformers"]),
    help="Who makes the model of the weights. [default: headfold for the families it has a table of]",
)
REMOTE_CODE = click.option("--trust-remote-code", is_flag=True, help="Let transformers run code beside the weights.")
BASE = click.option(
    "--base", type=click.Path(path_type=Path), help="What CHECKPOINT is an adapter of. [default: what it says itself]"
)
HF_OUTPUT = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Hugging Face directory to make."
)
INIT = click.option(
    "--init",
    type=click.Choice(["svd", "procrustes", "mean", "first", "random"]),
    default="svd",
    show_default=True,
    help="How a group's key/value head starts. mean, first, random: Ainslie et al. 2023.",
)


def dtype_of(what: str) -> Callable[[Command], Command]:
    """`--dtype` of a checkpoint that is written; by default that of `what`."""
    return click.option("--dtype", type=click.Choice(FLOATS), help=f"Of the output. [default: the {what}'s]")


def options(command: Command, *added: Callable[..., Any]) -> Command:
    """The command with these options, in this order."""
    for option in reversed(added):
        command = option(command)
    return command


def refuse_idle(idle: bool, *names: str, why: str, fix: str) -> None:
    """Where they are `idle`, refuse the first of these options that was given: whoever gives one thinks that it does something.

    Permissions are never idle: --force, --allow-nan and --resume allow what need not happen.

    Args:
        idle: whether they have no effect beside the other options.
        names: of parameters of the command that runs.
        why: what they are for.
        fix: what gives them an effect.

    Raises:
        InputError: one was given.
    """
    context = click.get_current_context()
    assert context is not None
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") not in (None, ParameterSource.DEFAULT)
        if idle and parameter.name in names and given:
            raise InputError(why, where=max(parameter.opts, key=len), fix=fix)


def reporter_for(quiet: bool) -> "Reporter":
    """What tells a person how far a command is."""
    from headfold.export.progress import Reporter

    return Reporter(quiet=quiet)


def check_file(path: Path) -> None:
    """Refuse before the work what `write_file` would refuse after it; what killed processes left of it goes. Raises InputError."""
    from headfold.export.publishing import recover

    recover(path)
    if not path.absolute().parent.is_dir():
        raise InputError("is no directory", where=path.absolute().parent, fix="Create it first.")
    if path.is_dir():
        raise InputError("is a directory", where=path, fix="Name a file.")


def write_file(path: Path, content: object) -> None:
    """Write JSON to a file, which may be there, whole or not at all. Raises InputError: the disk is full or may not be written."""
    from headfold.export.publishing import one_line, publish_file

    text = json.dumps(_plain(content), indent=2, default=str) + "\n"
    with one_line(InputError, path, "Free some space, or choose another place."):
        publish_file(path, lambda stage: stage.write_text(text))


def print_json(content: object) -> None:
    """One JSON object on standard output; what a terminal would obey instead of show is escaped, for it may come from strangers."""
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, default=str)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _plain(content: object) -> object:
    """JSON has no numbers that are not finite; they become null."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
