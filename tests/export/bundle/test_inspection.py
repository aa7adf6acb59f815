"""What `headfold inspect` says of a bundle: without torch, and never in the words of a terminal or of markup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.cli import main
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter


@pytest.fixture(scope="module")
def bundle(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspected") / "bundle"
    export_bundle(open_exportable(toy_checkpoint), path, ExportOptions(verify=False), Reporter(quiet=True))
    return path


def test_a_bundle_is_inspected_without_torch(bundle) -> None:
    code = (
        "import sys; from pathlib import Path; from headfold.export.bundle.inspection import inspect_path, render\n"
        f"render(inspect_path(Path({str(bundle)!r}))); print('modules', *sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "weight bytes" in shown
    assert not {"torch", "onnxruntime", "onnx", "transformers"} & set(shown.rpartition("modules")[2].split())


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_what_strangers_wrote_into_a_manifest_is_shown_and_not_obeyed(arguments, bundle) -> None:
    path = bundle / "manifest.json"
    before = path.read_text()
    tools = {"torch": "\x1b]0;title\x07", "x": "\x9b2J \u202e", "y": "[bold red]danger[/bold red] :warning:"}
    try:
        path.write_text(
            json.dumps(json.loads(before) | {"source": "\x1b[31mred [link=http://x]y[/link]", "tools": tools})
        )
        result = CliRunner().invoke(main, ["inspect", str(bundle), *arguments])
    finally:
        path.write_text(before)
    assert result.exit_code == 0, result.output
    assert all(character.isprintable() or character == "\n" for character in result.output)
    joined = " ".join(result.output.split())
    assert "[link=http://x]y[/link]" in joined
    assert "[bold red]danger[/bold red] :warning:" in joined
    if arguments:
        assert json.loads(result.output)["tools"] == tools
