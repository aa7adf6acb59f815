"""The GLU study: equal parameters, the same data and seeds for all, and the table."""

import json

import pytest
import torch
from click.testing import CliRunner

from headfold.export.cli import main
from headfold.export.model.config import FEED_FORWARDS
from headfold.export.model.initialize import new_decoder
from headfold.export.studies.glu import GluOptions, byte_tokens, glu_config


def run(*arguments: object):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = CliRunner().invoke(main, ["study", "glu", *map(str, arguments)])
    torch.set_num_threads(threads)
    return done


def test_all_eight_have_equal_parameters_and_the_papers_activations():
    options = GluOptions()
    models = {name: new_decoder(glu_config(name, options, 16), 0) for name in FEED_FORWARDS}
    assert len(models) == 8
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    assert glu_config("SwiGLU", options, 16).intermediate_size == 256
    assert all(glu_config(name, options, 16).feed_forward == name for name in FEED_FORWARDS)


@pytest.mark.slow
def test_the_table(toys, tmp_path):
    small = ("--hidden-size", 32, "--d-ff", 48, "--layers", 1, "--heads", 2, "--batch", 4, "--sequence", 32, "--quiet")
    small += ("--evaluate-sequences", 8)
    done = run("--data", toys / "text.txt", "--steps", 16, "--seeds", 2, *small, "-o", tmp_path / "glu.json")
    assert done.exit_code == 0, done.stderr
    for name in FEED_FORWARDS:
        assert name in done.stdout
    assert "2 steps" in done.stdout
    assert " ± " in done.stdout
    table = json.loads((tmp_path / "glu.json").read_text())
    assert [row["name"] for row in table["rows"]] == list(FEED_FORWARDS)
    for row in table["rows"]:
        assert len(row["early"]) == len(row["final"]) == 2
        assert row["final"][0] != row["final"][1]  # another seed, another run
        assert max(row["final"]) < min(row["early"])  # they learn
    again = run("--data", toys / "text.txt", "--steps", 16, "--seeds", 1, *small, "--variants", "GELU", "--json")
    (gelu,) = json.loads(again.stdout)["rows"]
    assert gelu["final"] == table["rows"][list(FEED_FORWARDS).index("GELU")]["final"][:1]  # repeatable


def test_bytes_as_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "é"}\n{"text": "b"}\n')
    assert byte_tokens([str(tmp_path / "a.jsonl")], "text").ids.tolist() == [0xC3, 0xA9, 256, ord("b"), 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--d-ff", 100), "choose a multiple of 3"),
        (("--seeds", 0), "seeds is 0"),
        (("--variants", "GELU,GLUE"), "'GLUE' is unknown"),
        (("--heads", 5), "not divisible by 5 heads"),
        (("--sequence", 10**6), "less than one batch"),
    ],
)
def test_bad_options_are_one_line(toys, arguments, message):
    done = run("--data", toys / "text.txt", "--quiet", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
