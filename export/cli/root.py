"""The command line. Every command is thin: it parses, calls one function of the library, and prints.

Errors are one line on standard error: exit code 2 for bad usage or input, 1 for a failed verification, 3 for a bug of ours.
Heavy imports happen inside the commands, so that `--help` and completion are instant.
"""

import io
import os
import sys
from importlib.metadata import version
from typing import Any

import rich_click as click
from click.exceptions import Abort, ClickException, Exit, UsageError

from headfold.export.cli.build import build
from headfold.export.cli.convert import convert
from headfold.export.cli.export import export
from headfold.export.cli.inspect import families, inspect
from headfold.export.cli.train import study, sweep, uptrain
from headfold.export.cli.using.generate import chat, generate
from headfold.export.cli.using.package import package
from headfold.export.cli.using.score import lm_eval, score
from headfold.export.cli.using.serve import serve
from headfold.export.cli.verify import verify
from headfold.export.files import CANNOT_WRITE
from headfold.runtime.errors import HeadfoldError, printable

click.rich_click.TEXT_MARKUP = "markdown"
click.rich_click.MAX_WIDTH = 100


_INTERRUPTED, _BROKEN_PIPE, _OURS = 130, 141, 3  # exit codes: 128 and the signal, as shells have it; a bug of ours
_EXTRAS = {  # of pyproject.toml: what a package that is missing belongs to; to headfold itself where there is none
    "": ("jinja2", "numpy", "psutil", "pydantic", "tokenizers"),
    "ort": ("onnxruntime",),
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors", "gguf", "ml_dtypes", "rich"),
    "train": ("accelerate", "datasets", "matplotlib", "pyarrow"),
    "tensorrt-rtx": ("tensorrt_rtx", "triton", "cuda"),
    "transformers": ("transformers",),
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
    "lm-eval": ("lm_eval",),
}


class Group(click.RichGroup):
    """Turns exceptions into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See click.Group.main."""
        if not kwargs.get("standalone_mode", True):  # who calls us deals with what is raised
            return super().main(*args, **kwargs)
        for stream in (sys.stdout, sys.stderr):  # an encoding without some characters shows others in their place
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            try:
                sys.exit(self._run(*args, **kwargs))
            finally:
                sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:
            # click and rich make exit code 1 of a pipe whose reader has seen enough; ours means a failed verification
            if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
                raise
            for broken in (sys.stdout, sys.stderr):  # nothing more can be written, at exit neither
                os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())
            sys.exit(_BROKEN_PIPE)

    def _run(self, *args: Any, **kwargs: Any) -> int:
        """The exit code."""
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except ClickException as error:
            context = error.ctx if isinstance(error, UsageError) else None
            hint = f" See {context.command_path} --help." if context is not None else ""
            click.echo(f"headfold: error: {printable(error.format_message())}{hint}", err=True)
            return error.exit_code
        except Abort:
            return _INTERRUPTED
        return code if isinstance(code, int) else 0

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Group.invoke."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("headfold: interrupted", err=True)
            sys.exit(_INTERRUPTED)
        except (ClickException, Exit, Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            line, code = explain(error)
            click.echo(f"headfold: {line}", err=True)
            sys.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """One line for a person, and the exit code."""
    if isinstance(error, HeadfoldError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE and error.filename is not None:
        return f"error: {printable(str(error.filename))}: {error.strerror}.", 2
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        if extra is not None:
            wanted = f'"headfold[{extra}]"' if extra else "headfold"
            return f"error: {package} is not installed. Install it: pip install {wanted}.", 2
    reason = printable(f"{type(error).__name__}: {error}")
    return f"internal error: {reason}. Please report it with the traceback that `headfold --debug` shows.", _OURS


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("headfold"), prog_name="headfold")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:  # `Group.invoke` reads `debug`
    """Turn checkpoints of SwiGLU + grouped-query-attention decoders into verified ONNX bundles, and run them.

    **Example**

    `headfold export ./SmolLM2-135M-Instruct -o smol` and then `headfold chat smol`

    Shell completion, for bash (zsh and fish alike): `eval "$(_HEADFOLD_COMPLETE=bash_source headfold)"`
    """


_COMMANDS = (
    export,
    verify,
    generate,
    chat,
    score,
    lm_eval,
    serve,
    package,
    inspect,
    families,
    build,
    convert,
    uptrain,
    sweep,
    study,
)
for _command in _COMMANDS:
    main.add_command(_command)
