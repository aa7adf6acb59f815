"""What `manifest.json`, `weights.json` and `parity.json` say of a bundle is so, or it is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import CONFIG, checkpoint, run

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedCheckpoint
from headfold.export.exportables.rounding_record import read_record, record_of, record_to_json
from headfold.export.model.rounding import Form
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import read_manifest, sha256

UP = "model.layers.1.mlp.up_proj.weight"


def changed(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The bundle with another file of JSON, which the manifest lists as it is now."""
    content = json.loads((bundle / name).read_text())
    change(content)
    (bundle / name).write_text(json.dumps(content))
    if name != "manifest.json":
        entry = {"size": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
        changed(bundle, "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    return bundle


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", lambda m: m.update(vocab_size=159), "logits is not the manifest's tensor(float) with 159"),
        ("manifest.json", lambda m: m.update(logits="all"), "its logits are not those of all tokens"),
        ("manifest.json", lambda m: m.update(dtype="float16"), "logits is not the manifest's tensor(float16)"),
        ("manifest.json", lambda m: m.update(parameters=1), "says 1 parameters, and the model has "),
        (
            "manifest.json",
            lambda m: m["cache"].update(num_key_value_heads=1),
            "is not the manifest's tensor(float) with 1",
        ),
        ("manifest.json", lambda m: m["outputs"][0].update(name="x"), "its logits is not the manifest's"),
        ("manifest.json", lambda m: m["inputs"][0].update(dtype="int32"), "its input_ids is not the manifest's"),
        (
            "manifest.json",
            lambda m: m["parity"].update(passed=False),
            "parity.json and manifest.json differ in 'passed'",
        ),
        ("parity.json", lambda report: report.update(passed=False), "parity.json and manifest.json differ in 'passed'"),
        ("parity.json", lambda report: report.clear(), "parity.json and manifest.json differ in 'passed'"),
        (
            "parity.json",
            lambda r: r["weights"]["cost"].update(kl=0.0),
            "parity.json and manifest.json differ in 'weights'",
        ),
    ],
)
def test_verify_holds_a_manifest_to_graph_model_and_report(name, change, message, bundle, source, tmp_path) -> None:
    other = changed(shutil.copytree(bundle, tmp_path / "other"), name, change)
    code, output = run("verify", other, "--against", source, "--decode-steps", "1", "-q")
    assert code == 2, output
    assert message in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"sha256": "0" * 64}, "has another SHA-256"),
        ({"relative_squared_error": 0.25}, "of its squares, not 0.25"),
        ({"quantized": "gptq"}, "is not quantized in the checkpoint, not gptq"),
    ],
)
def test_what_the_record_says_of_a_weight_is_proven(said, why, bundle, source, tmp_path) -> None:
    other = changed(
        shutil.copytree(bundle, tmp_path / "other"), "weights.json", lambda r: r["tensors"][UP].update(said)
    )
    report = verify_bundle(other, OwnModel(open_checkpoint(source)), read_manifest(other), 1, Reporter(quiet=True))
    assert report.failure().startswith(f"differs from PyTorch in what weights.json says of rounded weights: {UP} ")
    assert why in report.failure()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("scheme", "int8"),
        ("block_size", 64),
        ("kept", 3),
        ("bits", 4.0),
        ("accuracy_level", 1),
        ("max_kl", 1e-9),
        ("cost", {"kl": -5.0}),
        ("cost", None),
    ],
)
def test_what_the_manifest_says_of_the_weights_is_proven(field, said, bundle, source) -> None:
    manifest = read_manifest(bundle)
    said = manifest.weights.cost.model_copy(update=said) if isinstance(said, dict) else said
    manifest = manifest.model_copy(update={"weights": manifest.weights.model_copy(update={field: said})})
    assert getattr(read_manifest(bundle).weights, field) != said
    report = verify_bundle(bundle, OwnModel(open_checkpoint(source)), manifest, 4, Reporter(quiet=True))
    where = f"weights.{'cost' if field == 'max_kl' else field}"
    assert report.failure() == (
        f"differs from PyTorch in what the manifest says of rounded weights: {where} says something else than the bundle has"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.update(more={}), "is no record of rounded weights"),
        (lambda tensors: tensors["lm_head.weight"].update(bits=5), "lm_head.weight cannot have been rounded so"),
        (lambda tensors: tensors["lm_head.weight"].update(block_size=[32]), "lm_head.weight cannot have been rounded"),
        (lambda tensors: tensors.clear(), "names no rounded weight"),
    ],
)
def test_a_record_that_is_wrong_is_one_line(damage, message, tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(replace(CONFIG, tie_word_embeddings=False)), torch.float32)
    original = open_checkpoint(tmp_path / "source")
    content = record_to_json(record_of(RoundedCheckpoint(original, {"lm_head.weight": Form(8)}), {}))
    damage(content["tensors"])
    (tmp_path / "weights.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        read_record(tmp_path / "weights.json", original.shapes(), original.config)


def test_a_record_without_a_weight_that_is_rounded_is_one_line(bundle, source, tmp_path) -> None:
    other = changed(
        shutil.copytree(bundle, tmp_path / "other"), "weights.json", lambda record: record["tensors"].pop(UP)
    )
    with pytest.raises(BundleError, match=f"weights.json: says nothing of {UP}, which is rounded"):
        verify_bundle(other, OwnModel(open_checkpoint(source)), read_manifest(other), 1, Reporter(quiet=True))


def test_a_record_that_is_missing_is_one_line(bundle, source, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "weights.json").unlink()
    with pytest.raises(BundleError, match=r"weights\.json: is missing"):
        verify_bundle(
            tmp_path / "bundle", OwnModel(open_checkpoint(source)), read_manifest(bundle), 4, Reporter(quiet=True)
        )
