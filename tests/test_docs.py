"""Every command and example of docs/ runs, on a small random model and a short text; a page's commands one after the other."""

import re
import shlex
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as ray_cli

from headfold.export.cli import main
from headfold.runtime.server.ray import app as ray_app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RAY = "headfold.runtime.server.ray:app"
STAYS = "# runs until it is stopped"
FROM = "# from "  # a piece of a file, as it stands there


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "serve":  # Ray's command
        context = ray_cli.commands[words[1]].make_context(words[1], words[2:])
        assert context.params["config_or_import_path"] == RAY
        ray_app(dict(argument.split("=", 1) for argument in context.params["arguments"]))
        return
    assert words.pop(0) == "headfold", line
    if line.endswith(STAYS):  # its options are understood
        command = main.get_command(None, words[0])
        command.make_context(words[0], words[1:])
        return
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.fixture
def place(tmp_path, monkeypatch, toy_checkpoint) -> Path:
    copytree(toy_checkpoint, tmp_path / "my-model")
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADFOLD_API_KEY", "k")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_a_page_s_examples_run(page, place, make_bundle) -> None:
    found = blocks(page)
    if not any("-o small\n" in text for _, text in found):
        make_bundle(place / "small")
    for kind, text in found:
        if kind == "sh":
            for line in text.splitlines():
                run(line)
        elif kind == "yaml":
            (deployed,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
            assert deployed.import_path == RAY
            ray_app(deployed.args)
        elif text.startswith(FROM):
            name, _, piece = text.removeprefix(FROM).partition("\n")
            assert piece in (ROOT / name).read_text()
        else:
            exec(compile(text, str(page), "exec"), {"__name__": "example"})


@pytest.fixture
def make_bundle(toy_checkpoint):
    def make(path: Path) -> None:
        result = CliRunner().invoke(main, ["export", str(toy_checkpoint), "-o", str(path), "--no-verify", "-q"])
        assert result.exit_code == 0, result.output

    return make


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
