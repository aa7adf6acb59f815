"""Usage of the command line: one line for every mistake, the right exit code, help for every option, pipes and interrupts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from headfold.export.cli import main

PROGRAM = Path(sys.executable).parent / "headfold"


def commands(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        found += (
            commands(command, f"{prefix}{name} ") if isinstance(command, click.Group) else [(prefix + name, command)]
        )
    return found


COMMANDS = dict(commands(main))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_every_command_an_example(name) -> None:
    options = [option for option in COMMANDS[name].params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert f"headfold {name}" in (COMMANDS[name].help or "")


def test_the_root_has_an_example_and_tells_the_commands_without_arguments() -> None:
    assert "headfold export ./SmolLM2-135M-Instruct -o smol" in (main.help or "")
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "export" in result.output


def test_no_option_takes_a_number_that_is_not_finite() -> None:
    options = [(name, option) for name, command in COMMANDS.items() for option in command.params]
    numbers = [(name, x) for name, x in options if isinstance(x.type, click.types.FloatParamType)]
    assert {"export", "serve", "uptrain"} <= {name for name, _ in numbers}
    for _, option in numbers:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(click.BadParameter):
                option.type.convert(value, option, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "Missing argument 'CHECKPOINT'."),
        (["export", "x", "-o", "y", "--dtype", "float8"], "Invalid value for '--dtype'"),
        (["export", "x", "-o", "y", "--max-kl", "nan"], "'--max-kl': nan is no finite number."),
        (["no-such-command"], "No such command 'no-such-command'."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


EXPORT, CONVERT, VERIFY = ["export", "x", "-o", "y"], ["convert", "x", "-o", "y"], ["verify", "x", "--against", "y"]
UPTRAIN = ["uptrain", "x", "-o", "y", "--data", "z", "--tokens", "9"]
SWEEP = ["sweep", "x", "-o", "y", "--data", "z", "--tokens", "9", "--kv-heads", "1"]
GLU = ["study", "glu", "--data", "z"]
GENERATE, CHAT = ["generate", "BUNDLE", "the"], ["chat", "BUNDLE"]
GREEDY = "is of sampling, and this is greedy"
IDLE = [  # a command line, the option in it that does nothing there, and why
    ([*EXPORT, "--data", "z"], "--data", "is for calibrating a quantized cache"),
    ([*EXPORT, "--calibration-tokens", "9"], "--calibration-tokens", "is for calibrating a quantized cache"),
    ([*EXPORT, "--no-verify", "--decode-steps", "16"], "--decode-steps", "is of the comparison"),
    ([*EXPORT, "--attention", "native"], "--attention", "is for building an engine"),
    ([*EXPORT, "--sm", "86"], "--sm", "is for building an engine"),
    ([*EXPORT, "--max-batch", "4"], "--max-batch", "is for building an engine"),
    ([*EXPORT, "--max-input", "4"], "--max-input", "is for building an engine"),
    ([*EXPORT, "--weight-streaming"], "--weight-streaming", "is for building an engine"),
    ([*EXPORT, "--workspace", "4"], "--workspace", "is for building an engine"),
    ([*EXPORT, "--timing-cache", "z"], "--timing-cache", "is for building an engine"),
    (
        [*EXPORT, "--target", "tensorrt-rtx", "--sm", "86", "--timing-cache", "z"],
        "--timing-cache",
        "TensorRT-RTX times nothing",
    ),
    (
        ["export", "CHECKPOINT", "-o", "y", "--trust-remote-code"],
        "--trust-remote-code",
        "runs no code beside the weights",
    ),
    ([*VERIFY, "--attention", "plugin"], "--attention", "is of TensorRT networks"),
    *(
        ([*CONVERT, "--ffn", "swiglu", f"--{name}", value], f"--{name}", "is of the conversion to fewer")
        for name, value in (
            ("init", "svd"),
            ("grouping", "contiguous"),
            ("data", "z"),
            ("calibration-tokens", "8192"),
            ("calibration-length", "256"),
            ("seed", "0"),
            ("report", "z"),
        )
    ),
    ([*CONVERT, "--kv-heads", "1", "--data", "z", "--seed", "1"], "--seed", "is of the model's own text"),
    ([*UPTRAIN, "--teacher", "t", "--loss", "ce"], "--teacher", "is of the losses kl and kl+ce"),
    ([*UPTRAIN, "--teacher", "t", "--ce-weight", "0.5"], "--ce-weight", "is of the loss kl+ce"),
    ([*UPTRAIN, "--validation", "v", "--holdout", "0.1"], "--holdout", "is of validating on a share"),
    ([*UPTRAIN, "--holdout", "0", "--evaluate-every", "9"], "--evaluate-every", "is of validation"),
    ([*UPTRAIN, "--checkpoint-every", "0", "--keep", "3"], "--keep", "is of checkpoints on the way"),
    (["uptrain", "x", "-o", "y", "--data", "TEXT", "--text-field", "x"], "--text-field", "is of data with columns"),
    ([*SWEEP, "--ce-weight", "0.5"], "--ce-weight", "is of the loss kl+ce"),
    ([*SWEEP, "--validation", "v", "--holdout", "0.1"], "--holdout", "is of validating on a share"),
    *(
        (["sweep", "CHECKPOINT", *SWEEP[2:-1], "2", *given], given[0], "is of other counts")  # than its own 2
        for given in (("--init", "svd"), ("--loss", "kl"), ("--baseline",))
    ),
    ([*GLU, "--validation", "v", "--holdout", "0.1"], "--holdout", "is of validating on a share"),
    (["study", "glu", "--data", "TEXT", "--text-field", "x"], "--text-field", "is of data with columns"),
    *(
        ([*command, f"--{name}", value, *greedy], f"--{name}", GREEDY)
        for name, value in (("top-k", "5"), ("top-p", "0.9"), ("min-p", "0.1"), ("seed", "0"))
        for command, greedy in ((GENERATE, ()), (GENERATE, ("--temperature", "0")), (CHAT, ()))
    ),
    ([*GENERATE, "--backend", "tensorrt", "--provider", "cpu"], "--provider", "is of ONNX Runtime"),
    ([*GENERATE, "--backend", "tensorrt", "--threads", "1"], "--threads", "is of ONNX Runtime"),
    (["inspect", "BUNDLE", "--via", "headfold"], "--via", "is of checkpoints"),
    (["inspect", "BUNDLE", "--trust-remote-code"], "--trust-remote-code", "is of checkpoints"),
]


@pytest.fixture(scope="module")
def bundle(toy_checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("usage") / "b"
    result = CliRunner().invoke(main, ["export", str(toy_checkpoint), "-o", str(path), "--no-verify", "-q"])
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize(("arguments", "option", "why"), IDLE)
def test_an_option_without_effect_where_it_stands_is_refused(
    arguments, option, why, toy_checkpoint, bundle, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the")
    paths = {"CHECKPOINT": str(toy_checkpoint), "BUNDLE": str(bundle), "TEXT": "text.txt"}
    result = CliRunner().invoke(main, [paths.get(part, part) for part in arguments])
    assert result.exit_code == 2, result.output
    assert f"headfold: error: {option}: " in result.stderr
    assert why in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_option_that_has_an_effect_is_not(bundle) -> None:
    sampled = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "1", "-n", "2"]
    for arguments in (sampled, ["--repetition-penalty", "1.1", "-n", "2"]):
        result = CliRunner().invoke(main, ["generate", str(bundle), "the", *arguments])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["build", "--sm", "86"],
        ["package", "--for", "triton", "-o", "there"],
        ["verify", "--against", "."],
    ],
)
def test_a_checkpoint_in_place_of_a_bundle_is_to_be_exported_first(arguments, toy_checkpoint) -> None:
    command, *options = arguments
    result = CliRunner().invoke(main, [command, str(toy_checkpoint), *(options or ["the"])])
    assert result.exit_code == 2
    assert "is a checkpoint, not a bundle. Export it first: `headfold export" in result.stderr


def test_a_package_that_is_missing_names_its_extra(tmp_path) -> None:
    code = (
        "import sys; sys.modules['{0}'] = None\n"
        "from headfold.export.cli import main\nsys.argv = ['headfold', *sys.argv[1:]]\nmain()"
    )
    for package, extra, arguments in (
        ("torch", "export", ["export", ".", "-o", str(tmp_path / "b")]),
        ("safetensors", "export", ["inspect", str(tmp_path)]),
        ("accelerate", "train", ["uptrain", "x", "-o", str(tmp_path / "b"), "--data", "y"]),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code.format(package), *arguments], capture_output=True, text=True, check=False
        )
        assert run.returncode == 2, run.stderr
        assert f'{package} is not installed. Install it: pip install "headfold[{extra}]".' in run.stderr


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        (["inspect", "CHECKPOINT", "--json"], "stdout"),
        (["inspect", "CHECKPOINT"], "stdout"),
        (["--help"], "stdout"),
        ([], "stdout"),
        (["--version"], "stdout"),
        (["inspect", "nothing"], "stderr"),
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error(arguments, closed, toy_checkpoint) -> None:
    command = [PROGRAM, *(toy_checkpoint if part == "CHECKPOINT" else part for part in arguments)]
    read, write = os.pipe()
    os.close(read)
    open_one = "stderr" if closed == "stdout" else "stdout"
    run = subprocess.run(command, **{closed: write, open_one: subprocess.PIPE}, check=False)
    os.close(write)
    assert run.returncode == 141
    assert not getattr(run, open_one)


def test_an_interrupt_is_130_and_leaves_nothing(toy_checkpoint, tmp_path) -> None:
    code = "import signal, time; from headfold.export import cli, publishing; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore it
    code += "publishing.sync_tree = lambda new: (print('made', flush=True), time.sleep(600)); cli.main()"
    command = [sys.executable, "-c", code, "export", toy_checkpoint, "-o", tmp_path / "b", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"  # and not yet published
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr == "headfold: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_an_encoding_without_some_characters_shows_others() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = subprocess.run([PROGRAM, "inspect", "☃"], env=environment, capture_output=True, check=False)
    assert run.returncode == 2
    assert b"no such file or directory" in run.stderr
