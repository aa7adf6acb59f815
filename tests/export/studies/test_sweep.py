"""The sweep: what it measures, what it picks, and the page it writes."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main
from headfold.export.studies.sweep import default_contexts
from headfold.export.studies.sweep_report import render_html
from headfold.export.studies.sweep_results import Choice, Point, SweepReport, choose, pareto


def point(kv_heads: int, loss: float, **changes) -> Point:
    times = {512: 0.001 * kv_heads, 2048: 0.002 * kv_heads}
    curve = [(0, loss + 0.3), (1000, loss)]
    made = Point(
        kv_heads, loss + 0.3, loss, curve, [0.1, 0.02], 1024 * kv_heads, 10**6, 9000, {512: 17, 2048: 4}, times
    )
    return replace(made, **changes)


POINTS = [point(1, 3.0), point(2, 2.5), point(4, 2.6), point(8, 2.2)]


def test_the_front_leaves_out_what_is_larger_and_worse():
    assert [p.kv_heads for p in pareto(POINTS)] == [1, 2, 8]
    assert [p.kv_heads for p in pareto(list(reversed(POINTS)))] == [1, 2, 8]


@pytest.mark.parametrize(
    ("budget", "max_loss", "chosen", "reason"),
    [
        (4096, None, 2, "lowest loss after uptraining, 2.5000, of the 3 counts within 4,096 bytes"),
        (1 << 20, None, 8, "lowest loss"),
        (100, None, None, "No count is within 100 bytes per token: for 1 key/value head it is 1,024"),
        (None, 2.7, 2, "smallest cache, 2,048 bytes per token, of the 3 counts whose loss"),
        (None, 1.0, None, "No count has a loss of at most 1: the lowest, of 8 key/value heads, is 2.2000"),
        (2048, 2.4, None, "No count within 2,048 bytes per token has a loss of at most 2.4"),
        (None, None, None, "No choice was asked for"),
    ],
)
def test_the_choice_and_why(budget, max_loss, chosen, reason):
    choice = choose(POINTS, budget, max_loss)
    assert choice.kv_heads == chosen
    assert reason in choice.reason


def test_contexts_by_default_are_ones_the_model_can_have():
    assert default_contexts(32768, 16) == (512, 2048, 8192)
    assert default_contexts(2048, 16) == (512,)
    assert default_contexts(144, 16) == (32, 64, 128)


@pytest.fixture(scope="module")
def swept(toys, tmp_path_factory):
    """A finished sweep of the toy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("sweep") / "out"
    arguments = [
        "sweep",
        toys / "mha",
        "--kv-heads",
        "1,2",
        "-o",
        output,
        "--data",
        toys / "text.txt",
        "--holdout",
        0.1,
    ]
    arguments += ["--alpha", 0.1, "--pretrain-tokens", 10240, "--baseline", "--batch", 8, "--sequence", 16]
    arguments += [
        "--learning-rate",
        3e-3,
        "--memory",
        "2MiB",
        "--contexts",
        "8,32",
        "--rounds",
        1,
        "--evaluate-sequences",
        16,
        "--cpu",
        "--quiet",
    ]
    arguments += ["--cache", output.parent / "cache", "--budget-kv-bytes", 300, "--json", "--threads", 1]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return done, output, arguments


def test_a_sweep_measures_every_count(swept):
    done, output, _ = swept
    assert done.exit_code == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    assert report == json.loads(done.stdout)
    one, two, four = report["points"]
    assert [p["kv_heads"] for p in report["points"]] == [1, 2, 4]
    assert [p["kv_bytes_per_token"] for p in report["points"]] == [
        256,
        512,
        1024,
    ]  # 2 x 2 layers x heads x 16 x 4 bytes
    for p in report["points"]:
        room = (2 << 20) - p["weight_bytes"]
        assert p["cache_tokens"] == room // p["kv_bytes_per_token"]
        assert p["largest_batch"] == {"8": p["cache_tokens"] // 8, "32": p["cache_tokens"] // 32}
        assert all(seconds > 0 for seconds in p["seconds_per_token"].values())
    assert four["loss"] == four["converted_loss"]
    assert four["layer_errors"] == [0, 0]
    assert one["curve"][0] == [0, one["converted_loss"]]
    assert one["curve"][-1] == [1024, one["loss"]]
    assert one["baseline_curve"][-1][0] == 512  # 5 % of the pretraining
    assert report["control_curve"][-1][1] < four["loss"]  # the original has hardly been trained
    assert report["choice"]["kv_heads"] == 1
    assert all(0 < error < 2 for p in (one, two) for error in p["layer_errors"])
    assert not (output / "bundles").exists()


def test_its_checkpoints_are_the_uptrained_ones(swept, toys):
    from headfold.export.checkpoints.opening import load_decoder
    from headfold.export.data.token_data import TokenData
    from headfold.export.training.evaluation import evaluate

    _, output, _ = swept
    assert open_checkpoint(output / "kv-2").config.num_key_value_heads == 2
    (tokens,) = (output.parent / "cache").glob("*.uint16")
    import numpy as np

    _, held_out = TokenData(np.fromfile(tokens, np.uint16), "").split(0.1)
    loss = evaluate(load_decoder(open_checkpoint(output / "kv-1")), held_out, 16, 16)
    assert loss == pytest.approx(json.loads((output / "report.json").read_text())["points"][0]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--kv-heads", "3"), "3 key/value heads cannot be made of 4. Choose among its divisors: 1, 2, 4"),
        (("--kv-heads", "1;2"), "Give whole numbers with commas"),
        (("--contexts", "64"), "are not within the model's 64 positions"),
        (("--memory", "much"), "--memory is 'much'"),
        (("--holdout", "0"), "--holdout 0 leaves nothing for it"),
        ((), "already exists"),
    ],
)
def test_what_can_go_wrong(swept, tmp_path, changes, message):
    _, output, arguments = swept
    again = [str(argument) for argument in (*arguments, *changes)]
    if changes:
        again[again.index(str(output))] = str(tmp_path / "other")
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 2
    assert done.stderr.startswith("headfold: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_original_count_alone_is_nothing_to_sweep(swept, tmp_path):
    _, output, arguments = swept
    again = [str(argument) for argument in (*arguments, "--kv-heads", "4", "--no-control") if argument != "--baseline"]
    again[again.index(str(output))] = str(tmp_path / "other")
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 2
    assert "its own 4 key/value heads are nothing to sweep" in done.stderr


class References(HTMLParser):
    """Collects what a page would fetch, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in {"src", "href", "xlink:href", "action"} and v]
        if tag not in {"meta", "link", "br", "path", "use"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in {"src", "href", "xlink:href"} and v]

    def handle_endtag(self, tag):
        if tag not in {"path", "use"}:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(swept):
    _, output, _ = swept
    page = References()
    text = (output / "report.html").read_text()
    page.feed(text)
    assert page.open == []
    assert all(reference.startswith(("#", "data:")) for reference in page.found)
    assert "<script" not in text
    assert not re.search(r"url\(\s*['\"]?https?:|@import", text)
    words = " ".join(page.text)
    for expected in ("Quality against cache", "What uptraining recovers", "Where conversion hurts", "Time per token"):
        assert expected in words
    for label in (
        "chosen",
        "mean@5 %, 1",
        "original, trained on",
        "milliseconds per token",
        "256 B",
        "after 32 tokens",
    ):
        assert label in words


def test_the_page_escapes_names():
    facts = {"num_attention_heads": 8, "attention": "MHA", "parameters": 1, "num_hidden_layers": 2}
    machine = {"backend": "x", "threads": 1}
    report = SweepReport("<b>&", facts, SETTINGS, machine, 8, [], POINTS, Choice(2, "<because>"))
    html = render_html(report)
    assert "<b>&:" not in html
    assert "&lt;because&gt;" in html


SETTINGS = {
    "init": "svd",
    "tokens": 1000,
    "alpha": None,
    "pretrain_tokens": None,
    "loss": "kl",
    "memory": 1 << 30,
    "contexts": [512, 2048],
    "dtype": "float32",
    "rounds": 5,
}


@pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed")
def test_chromium_shows_it_without_complaint(swept, tmp_path):
    _, output, _ = swept
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path} --enable-logging=stderr --v=0"
    shot = tmp_path / "page.png"
    command = [
        "chromium",
        *flags.split(),
        f"--screenshot={shot}",
        "--window-size=1200,1800",
        f"file://{output}/report.html",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0
    assert "CONSOLE" not in ran.stderr
    assert shot.stat().st_size > 50_000


def test_resuming_repeats_no_training_and_a_choice_that_fails_is_exit_code_1(swept, monkeypatch):
    _, output, arguments = swept
    before = json.loads((output / "report.json").read_text())
    monkeypatch.setattr("headfold.export.training.loop._Run._step", None)  # would fail if it were called
    times = {2: {8: 1.0, 32: 1.0}, 4: {8: 1.0, 32: 1.0}}  # exporting and timing take the longest, and were tested above
    monkeypatch.setattr("headfold.export.studies.sweep._times", lambda *_: times)
    again = [*arguments, "--resume", "--kv-heads", "2", "--max-loss", "0.5"]
    done = CliRunner().invoke(main, [str(argument) for argument in again])
    assert done.exit_code == 1, done.stderr
    assert done.stderr.startswith(
        "headfold: error: No count is within 300 bytes per token: for 2 key/value heads it is 512"
    )
    after = json.loads((output / "report.json").read_text())
    assert [p["curve"] for p in after["points"]] == [p["curve"] for p in before["points"][1:]]
