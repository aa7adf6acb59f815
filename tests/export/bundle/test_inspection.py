"""What `headfold inspect` says of a bundle: without torch, and never in the words of a terminal or of markup."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from headfold.export.bundle.inspection import inspect_path
from headfold.export.cli import main
from headfold.runtime.errors import BundleError


def test_a_bundle_is_inspected_without_torch(toy_bundle) -> None:
    code = (
        "import sys; from pathlib import Path; from headfold.export.bundle.inspection import inspect_path, render\n"
        f"render(inspect_path(Path({str(toy_bundle)!r}))); print('modules', *sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "weight bytes" in shown
    assert not {"torch", "onnxruntime", "onnx", "transformers", "numpy"} & set(shown.rpartition("modules")[2].split())


def test_a_bundles_sizes_are_checked_and_its_hashes_are_left_to_who_runs_it(toy_bundle, tmp_path, monkeypatch) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    monkeypatch.setattr("headfold.runtime.manifest.sha256", None)  # of gigabytes it takes seconds
    assert inspect_path(bundle)["kind"] == "bundle"
    (bundle / "more").touch()
    with pytest.raises(BundleError, match="more: is not listed"):
        inspect_path(bundle)
    (bundle / "more").unlink()
    with (bundle / "model.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"model\.onnx\.data: has \d+ bytes, not the"):
        inspect_path(bundle)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_what_strangers_wrote_into_a_manifest_is_shown_and_not_obeyed(arguments, toy_bundle, tmp_path) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    path = bundle / "manifest.json"
    tools = {"torch": "\x1b]0;title\x07", "x": "\x9b2J \u202e", "y": "[bold red]danger[/bold red] :warning:"}
    strange = {"source": "\x1b[31mred [link=http://x]y[/link]", "tools": tools}
    path.write_text(json.dumps(json.loads(path.read_text()) | strange))
    result = CliRunner().invoke(main, ["inspect", str(bundle), *arguments])
    assert result.exit_code == 0, result.output
    assert all(character.isprintable() or character == "\n" for character in result.output)
    joined = " ".join(result.output.split())
    assert "[link=http://x]y[/link]" in joined
    assert "[bold red]danger[/bold red] :warning:" in joined
    if arguments:
        assert json.loads(result.output)["tools"] == tools


def test_tensors_of_a_checkpoint_that_no_forward_pass_reads_are_named(toy_checkpoint, tmp_path) -> None:
    assert inspect_path(toy_checkpoint)["ignored_tensors"] == []
    checkpoint = Path(shutil.copytree(toy_checkpoint, tmp_path / "checkpoint"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "v_head.summary.weight": torch.ones(1, 4)}
    weights = checkpoint / "model.safetensors"
    save_file(load_file(weights) | extra, weights, metadata={"format": "pt"})
    assert sorted(inspect_path(checkpoint)["ignored_tensors"]) == sorted(extra)
