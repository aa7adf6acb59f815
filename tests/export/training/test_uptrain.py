"""`headfold uptrain` from the outside: the whole chain, several processes, and what a user can get wrong."""

import json
import multiprocessing
import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.model.initialize import new_decoder
from headfold.export.training.options import TrainOptions
from headfold.export.training.state import read_log
from headfold.export.training.uptrain import Budget
from tests.export.conftest import TRAINED, byte_tokenizer

SMALL = ("--batch", 4, "--sequence", 16, "--learning-rate", 3e-3, "--quiet", "--cpu")
COMPARE = ("--decode-steps", 4, "-q")


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield
    torch.set_num_threads(threads)


def headfold(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_alpha_is_a_share_of_the_pretraining(toys):
    options = TrainOptions(steps=1, batch=8, sequence=100)
    assert (
        Budget(alpha=0.05, pretrain_tokens=1_000_000).steps(options) == 63
    )  # 50,000 tokens, rounded up to whole steps
    assert Budget(tokens=800).steps(options) == 1


def test_the_whole_chain(toys, tmp_path, subtests):
    """Train MHA, convert, uptrain, export with parity, build an engine, verify its network, generate: each by its command."""

    def run(*arguments: object) -> str:
        done = headfold(*arguments)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    mha, gqa, up, bundle = (tmp_path / name for name in ("mha", "gqa", "up", "bundle"))
    data = ("--data", toys / "text.txt", "--holdout", 0.05)
    run("uptrain", toys / "mha", "-o", mha, "--tokens", 16384, *data, *SMALL, "--batch", 16)
    calibration = ("--data", toys / "text.txt", "--calibration-length", 32)
    run("convert", mha, "-o", gqa, "--kv-heads", 1, "--init", "mean", *calibration, "--quiet")
    budget = ("--alpha", 0.25, "--pretrain-tokens", 16384)
    uptrained = json.loads(run("uptrain", gqa, "-o", up, "--teacher", mha, *budget, *data, *SMALL, "--json"))
    first, last = uptrained["evaluations"]
    assert last["loss"] < first["loss"]
    assert open_checkpoint(up).config.num_key_value_heads == 1
    run("export", up, "-o", bundle, "--dtype", "float16", *COMPARE)
    with subtests.test("TensorRT"):  # skips these two steps alone
        if find_spec("tensorrt_rtx") is None:
            pytest.skip("pip install tensorrt-rtx")
        sizes = ("--max-batch", 1, "--max-input", 16)
        built = json.loads(run("build", bundle, "--sm", 86, *sizes, "--json", "-q"))
        assert built["engine"]["layers"]["ATTENTION"] == 2
        assert (bundle / built["engine"]["file"]).stat().st_size == built["engine_bytes"]
        parity = run("verify", bundle, "--against", up, "--backend", "tensorrt-network", "--json", *COMPARE)
        assert json.loads(parity)["passed"]
    run("verify", bundle, "--against", up, *COMPARE)
    text = run("generate", bundle, "the cat ", "-n", 12, "--temperature", 0)
    decoder = load_decoder(open_checkpoint(up), torch.float16).float()
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = tokenizer.encode("the cat ").ids
    for _ in range(12):  # greedy in torch, without a cache; the best two logits are 0.07 or more apart
        ids.append(int(decoder(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == tokenizer.decode(ids)[len("the cat ") :] + "\n"
    assert set(text) <= set("thecasdogolmnkfwbir.\n ")  # letters of the text it learned


def as_two(*arguments: object) -> str:
    """Runs headfold in two processes that find each other as those of torchrun and `accelerate launch` do; returns what they print."""
    context = multiprocessing.get_context("forkserver")  # it has imported torch, and never computed anything
    context.set_forkserver_preload(["headfold.export.training.uptrain", "torch._dynamo", "torch._inductor.config"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes, printed = [], context.SimpleQueue()
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in (names | {"OMP_NUM_THREADS": 1}).items()}
        code = f"""
import contextlib, io, os
os.environ.update({environment!r})
from accelerate.state import PartialState
from headfold.export.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    main({[str(argument) for argument in arguments]!r}, standalone_mode=False)
printed.put(out.getvalue())
assert PartialState().num_processes == 2
"""
        processes.append(context.Process(target=exec, args=(code, {"printed": printed})))
        processes[-1].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return "".join(printed.get() for _ in processes)


def test_two_processes_follow_one(toys, tmp_path):
    """The same global batch on one process, and on two over gloo; then the two go on from their checkpoint."""
    arguments = ["--teacher", toys / "mha", "--tokens", 6 * 4 * 16, "--data", toys / "text.txt", "--holdout", 0.05]
    arguments += [*SMALL, "--checkpoint-every", 3]
    done = headfold("uptrain", toys / "student", "-o", tmp_path / "one", *arguments)
    assert done.exit_code == 0, done.stderr
    printed = as_two("uptrain", toys / "student", "-o", tmp_path / "two", *arguments)
    assert printed.count(f"wrote {tmp_path / 'two'}") == 1
    one, two = (read_log(tmp_path / f"{name}.training" / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8  # six steps, and the validation before and after
    for key in ("loss", "gradient_norm", "validation_loss"):
        first, second = ([line[key] for line in log if key in line] for log in (one, two))
        assert second == pytest.approx(first, abs=1e-5)  # float32, summed in another order
    a, b = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    whole = {name: b.read(name) for name in b}
    for name in a:
        torch.testing.assert_close(whole[name], a.read(name), atol=1e-4, rtol=1e-4)
    (tmp_path / "two").rename(tmp_path / "before")
    shutil.rmtree(tmp_path / "two.training" / "step-00000006")
    as_two("uptrain", toys / "student", "-o", tmp_path / "two", *arguments, "--resume")
    again = open_checkpoint(tmp_path / "two")
    assert all(torch.equal(again.read(name), tensor) for name, tensor in whole.items())


def test_several_processes_that_are_one_are_refused(toys, tmp_path, monkeypatch):
    """torchrun without a GPU and without --cpu; `accelerate launch --cpu`, which starts one, in the environment that it makes."""
    command = ["uptrain", toys / "student", "-o", tmp_path / "out", *TEXT(toys), *SMALL]
    command.remove("--cpu")
    launch = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "-m",
        "headfold.export",
    ]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(launch))
    _, accelerates = prepare_simple_launcher_cmd_env(parsed)
    for environment, message in (
        ({"WORLD_SIZE": "2"}, "2 processes were started that do not know of each other"),
        (accelerates, "was asked for several processes and started one"),
    ):
        with monkeypatch.context() as patched:
            for name in environment.keys() - os.environ.keys():
                patched.setenv(name, environment[name])
            done = headfold(*command)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def stranger(directory: Path, name: str, **changes: object) -> Path:
    """A teacher that does not fit."""
    from dataclasses import replace

    config = replace(TRAINED, **changes)
    files = TokenizerFiles({"tokenizer.json": byte_tokenizer(shift=0 if changes else 1)})
    tensors = new_decoder(config, seed=0).state_dict()
    save_hf(directory / name, MemoryCheckpoint(directory, config, tensors, files), torch.float32)
    return directory / name


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def finished(toys: Path, directory: Path) -> list[object]:
    """Arguments that resume a run, with another learning rate."""
    assert headfold("uptrain", toys / "student", "-o", directory / "out", *TEXT(toys), *SMALL).exit_code == 0
    (directory / "out").rename(directory / "elsewhere")
    return [*TEXT(toys), "--learning-rate", 1e-5, "--resume"]


def TEXT(toys: Path) -> list[object]:
    return ["--data", toys / "text.txt", "--tokens", 64]


BAD = {
    "no student": (lambda t, d: [*TEXT(t), "student", d / "none"], "no such file or directory"),
    "no data": (lambda t, d: ["--data", d / "none.txt", "--tokens", 64], "no such file or directory"),
    "empty data": (lambda t, d: ["--data", written(d / "e.txt", ""), "--tokens", 64], "has no text"),
    "less than a batch": (lambda t, d: ["--data", written(d / "e.txt", "abc"), "--tokens", 64], "less than one batch"),
    "alpha of nothing": (lambda t, d: ["--data", t / "text.txt", "--alpha", 0.05], "--pretrain-tokens"),
    "alpha over one": (lambda t, d: ["--data", t / "text.txt", "--alpha", 5, "--pretrain-tokens", 1e6], "alpha is 5"),
    "alpha zero": (lambda t, d: ["--data", t / "text.txt", "--alpha", 0, "--pretrain-tokens", 1e6], "alpha is 0"),
    "alpha and tokens": (lambda t, d: [*TEXT(t), "--alpha", 0.1, "--pretrain-tokens", 9], "Give either --tokens"),
    "neither": (lambda t, d: ["--data", t / "text.txt"], "Give either --tokens"),
    "kl without teacher": (lambda t, d: [*TEXT(t), "--loss", "kl"], "needs a teacher"),
    "other vocabulary": (
        lambda t, d: [*TEXT(t), "--teacher", stranger(d, "x", vocab_size=300)],
        "has 300 tokens in its vocabulary",
    ),
    "other tokenizer": (lambda t, d: [*TEXT(t), "--teacher", stranger(d, "x")], "its tokenizer gives id 0 to"),
    "sequence too long": (lambda t, d: [*TEXT(t), "--sequence", 65], "is over its 64 positions"),
    "micro-batch does not divide": (lambda t, d: [*TEXT(t), "--micro-batch", 3], "micro_batch is 3"),
    "no batch": (lambda t, d: [*TEXT(t), "--batch", 0], "batch is 0"),
    "negative learning rate": (lambda t, d: [*TEXT(t), "--learning-rate", -1], "learning_rate is -1"),
    "output exists": (lambda t, d: [*TEXT(t), "output", written(d / "there", "")], "already exists"),
    "validation is training": (lambda t, d: [*TEXT(t), "--validation", t / "text.txt"], "to train and to validate on"),
    "validation too short": (
        lambda t, d: [*TEXT(t), "--validation", written(d / "v.txt", "abc")],
        "validation tokens are less than one sequence",
    ),
    "resume with another config": (lambda t, d: finished(t, d), "learning_rate was 0.003 and is 1e-05"),
    "resume without asking": (lambda t, d: finished(t, d)[:-1], "has checkpoints of an earlier run"),
    "tensorboard missing": (lambda t, d: [*TEXT(t), "--tensorboard", d / "tb"], "tensorboard is not installed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(toys, tmp_path, case, monkeypatch):
    make, message = BAD[case]
    if case == "tensorboard missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = make(toys, tmp_path)
    student, output = toys / "student", tmp_path / "out"
    if "student" in arguments:
        student = arguments.pop(arguments.index("student") + 1)
        arguments.remove("student")
    if "output" in arguments:
        output = arguments.pop(arguments.index("output") + 1)
        arguments.remove("output")
    done = headfold("uptrain", student, "-o", output, *SMALL, *arguments)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.startswith("headfold: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_exits_with_1(toys, tmp_path):
    tokens = 64 * 40
    rate = ("--learning-rate", 1e4, "--clip", 1e9, "--warmup", 0)
    done = headfold(
        "uptrain", toys / "student", "-o", tmp_path / "out", *SMALL, *TEXT(toys)[:2], "--tokens", tokens, *rate
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("headfold: error: step ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_output_keeps_the_students_dtype_and_tokenizer(toys, tmp_path):
    save_hf(tmp_path / "half", open_checkpoint(toys / "student"), torch.bfloat16)
    done = headfold("uptrain", tmp_path / "half", "-o", tmp_path / "out", *SMALL, *TEXT(toys))
    assert done.exit_code == 0, done.stderr
    result = open_checkpoint(tmp_path / "out")
    assert {result.dtype(name) for name in result} == {torch.bfloat16}
    assert result.tokenizer.files.keys() == {"tokenizer.json"}
    first, last = (open_checkpoint(path).read("lm_head.weight") for path in (tmp_path / "half", tmp_path / "out"))
    assert not np.array_equal(first.float().numpy(), last.float().numpy())
