"""The command line. Every command is thin: it parses, calls one function of the library, and prints.

Errors are one line on standard error: exit code 2 for bad usage or input, 1 for a failed verification, 3 for a bug of ours.
Heavy imports happen inside the commands, so that `--help` and completion are instant.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

from headfold.export.cli import build as cli_build
from headfold.export.cli import convert as cli_convert
from headfold.export.cli import train as cli_train
from headfold.export.cli.engine import TARGETS, build_and_tell, check_early, engine_options, make_options
from headfold.runtime.errors import HeadfoldError, InputError

if TYPE_CHECKING:
    from headfold.export.parity.compare import Candidate
    from headfold.export.progress import Reporter
    from headfold.runtime import Model
    from headfold.runtime.manifest import Manifest

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

click.rich_click.TEXT_MARKUP = "markdown"
click.rich_click.MAX_WIDTH = 100


class Group(click.RichGroup):
    """Turns exceptions into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See click.Group.main."""
        debug = "--debug" in sys.argv
        try:
            return super().main(*args, **kwargs)
        except HeadfoldError as error:
            if debug:
                raise
            click.echo(f"headfold: error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if debug:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            click.echo(
                f"headfold: internal error: {reason}. Please report it with the traceback that --debug shows.", err=True
            )
            sys.exit(3)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("headfold"), prog_name="headfold")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Turn checkpoints of SwiGLU + grouped-query-attention decoders into verified ONNX bundles, and run them.

    Shell completion, for bash (zsh and fish alike): `eval "$(_HEADFOLD_COMPLETE=bash_source headfold)"`
    """


def _reporter(quiet: bool) -> "Reporter":
    from headfold.export.progress import Reporter

    return Reporter(quiet=quiet)


def _print_json(content: object) -> None:
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


@main.command()
@SOURCE
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the bundle to make.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--kv-cache",
    type=click.Choice(["int8", "float8_e4m3fn"]),
    help="Store keys and values in one byte each, with a scale per head. [default: in --dtype]",
)
@click.option("--data", multiple=True, help="Text to find these scales on. [default: the model writes its own]")
@click.option(
    "--calibration-tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="How much of it."
)
@click.option(
    "--capacity", type=int, help="Most tokens of a sequence, prompt and answer. [default: what the model was made for]"
)
@click.option("--all-logits", is_flag=True, help="Logits of every token, for scoring; not only of the last one.")
@click.option("--allow-nan", is_flag=True, help="Export weights that hold NaN or infinity.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with PyTorch before publishing.")
@STEPS
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--target", type=click.Choice(TARGETS), help="Build an engine into the bundle, too; see `build`.")
@engine_options
@JSON
@QUIET
def export(
    source: str,
    output: Path,
    dtype: Literal["float32", "float16", "bfloat16"],
    kv_cache: Literal["int8", "float8_e4m3fn"] | None,
    data: tuple[str, ...],
    calibration_tokens: int,
    capacity: int | None,
    all_logits: bool,
    allow_nan: bool,
    verify: bool,
    decode_steps: int,
    force: bool,
    target: str | None,
    as_json: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Export CHECKPOINT to a bundle, and prove it equal to PyTorch.

    CHECKPOINT is a Hugging Face directory or hub name (config.json and safetensors), or a GGUF file. A bundle that fails the
    comparison is not written.

    **Examples**

    `headfold export ./SmolLM2-135M-Instruct -o smol`

    `headfold export model.Q4_1.gguf -o smol-fp16 --dtype float16 --capacity 4096`

    `headfold export model.Q4_1.gguf -o smol-fp16 --dtype float16 --target tensorrt-rtx --sm 86,89,120`

    `headfold export model.Q4_1.gguf -o smol-int8 --kv-cache int8 --data corpus.txt`
    """
    from headfold.export.bundle.pipeline import ExportOptions, export_bundle
    from headfold.export.parity.rendering import render

    if data and kv_cache is None:
        raise InputError("is text to calibrate a quantized cache on", where="--data", fix="Add --kv-cache int8.")
    options = ExportOptions(
        dtype, capacity, all_logits, allow_nan, verify, decode_steps, force, kv_cache, data, calibration_tokens
    )
    reporter = _reporter(quiet)
    build = make_options(target, **engine) if target is not None else None
    if build is not None:
        check_early(build, dtype, kv_cache)
    result = export_bundle(Path(source), output, options, reporter)
    facts = build_and_tell(output, build, reporter) if build is not None else None
    if as_json:
        peak = {"weight_bytes": result.weight_bytes, "peak_bytes": result.peak_bytes}
        built = {"build": facts} if facts is not None else {}
        _print_json({"bundle": str(output), **peak, "manifest": result.manifest.model_dump(), **built})
        return
    if result.parity is not None and not quiet:
        render(result.parity, reporter.console)
    click.echo(f"wrote {output}")


@main.command()
@BUNDLE
@click.option("--against", "source", required=True, metavar="CHECKPOINT", help="What the bundle was exported from.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt-network"]),
    default="onnxruntime",
    show_default=True,
    help="tensorrt-network runs the network that TensorRT parsed, on the CPU.",
)
@click.option(
    "--attention",
    type=click.Choice(["native", "plugin"]),
    default="native",
    show_default=True,
    help="Of the TensorRT network.",
)
@STEPS
@JSON
@QUIET
def verify(
    bundle: Path,
    source: str,
    backend: str,
    attention: Literal["native", "plugin"],
    decode_steps: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare BUNDLE with its checkpoint in PyTorch. Exit code 1 if they differ by more than the tolerance.

    **Examples**

    `headfold verify smol --against ./SmolLM2-135M-Instruct`

    `headfold verify smol --against ./SmolLM2-135M-Instruct --backend tensorrt-network --attention plugin`
    """
    from headfold.export.parity.rendering import render
    from headfold.export.parity.verify import verify as verify_against

    candidate = None
    if backend == "tensorrt-network":
        from headfold.export.engine.network_runner import network_candidate
        from headfold.export.engine.options import BuildOptions

        def candidate(manifest: "Manifest") -> "Candidate":
            return network_candidate(bundle, manifest, BuildOptions(attention=attention))

    reporter = _reporter(quiet)
    report = verify_against(bundle, Path(source), decode_steps, reporter, candidate)
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        render(report, reporter.console)
    if not report.passed:
        click.echo(f"headfold: error: {bundle}: {report.failure()}", err=True)
        sys.exit(1)


def _sampling(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `generate` and `chat` share."""
    for option in reversed(
        (
            click.option("-n", "--max-new-tokens", type=click.IntRange(1), help="[default: 256, or what fits]"),
            click.option("--temperature", type=float, help="0 is greedy. [default: the bundle's]"),
            click.option("--top-k", type=int),
            click.option("--top-p", type=float),
            click.option("--min-p", type=float),
            click.option("--repetition-penalty", type=float),
            click.option("--seed", type=int, help="Makes sampling repeatable."),
            click.option(
                "--backend",
                type=click.Choice(["onnxruntime", "tensorrt"]),
                default="onnxruntime",
                show_default=True,
                help="TensorRT runs an engine that `headfold build` put into the bundle.",
            ),
            click.option("--provider", default="cpu", show_default=True, help="of ONNX Runtime: cpu or cuda"),
            click.option("--threads", type=click.IntRange(1), help="[default: physical cores]"),
        )
    ):
        command = option(command)
    return command


def _load(bundle: Path, backend: Literal["onnxruntime", "tensorrt"], provider: str, threads: int | None) -> "Model":
    from headfold.runtime import load

    return load(bundle, backend=backend, provider=provider, threads=threads)


@main.command()
@BUNDLE
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--chat", is_flag=True, help="Wrap each prompt in the chat template as a user's message.")
@click.option("--system", help="System message; implies --chat.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@_sampling
@JSON
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    backend: Literal["onnxruntime", "tensorrt"],
    provider: str,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue each PROMPT, or answer it with --chat; `-` or none reads one prompt from standard input.

    **Examples**

    `headfold generate smol "The capital of France is" -n 20`

    `headfold generate smol --chat "Why is the sky blue?" --temperature 0.7 --seed 1`
    """
    model = _load(bundle, backend, provider, threads)
    texts = [sys.stdin.read() if text == "-" else text for text in prompts or ("-",)]
    if any(not text for text in texts):
        raise InputError("the prompt is empty", fix="Give some text.")
    batch: list[Any] = list(texts)
    if chat or system:
        head = [{"role": "system", "content": system}] if system else []
        batch = [[*head, {"role": "user", "content": text}] for text in texts]
    arguments = {"stop": stop, **sampling}
    if as_json:
        _print_json([vars(generation) for generation in model.generate(batch, **arguments)])
    elif len(batch) == 1:
        for delta in model.generate(batch[0], stream=True, **arguments):
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
        click.echo()
    else:
        for text, generation in zip(texts, model.generate(batch, **arguments), strict=True):
            click.echo(f"> {text}\n{generation.text}\n")


@main.command()
@BUNDLE
@click.option("--system", help="System message.")
@_sampling
def chat(
    bundle: Path,
    system: str | None,
    backend: Literal["onnxruntime", "tensorrt"],
    provider: str,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Talk with the model; an empty line or Ctrl-D ends it.

    **Example**: `headfold chat smol --system "Answer in one sentence." --temperature 0.7`
    """
    model = _load(bundle, backend, provider, threads)
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
        for delta in model.generate(messages, stream=True, **sampling):
            answer += delta.text
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
        click.echo()
        messages.append({"role": "assistant", "content": answer})


@main.command()
@click.argument("path", metavar="CHECKPOINT|BUNDLE")
@JSON
def inspect(path: str, as_json: bool) -> None:
    """Show what is in a checkpoint or a bundle: architecture, parameters, heads, bytes of weights and cache, parity.

    **Example**: `headfold inspect smol --json`
    """
    from headfold.export.bundle.inspection import inspect_path, render

    facts = inspect_path(Path(path))
    if as_json:
        _print_json(facts)
    else:
        render(facts)


for _command in (*cli_build.COMMANDS, *cli_convert.COMMANDS, *cli_train.COMMANDS):
    main.add_command(_command)
