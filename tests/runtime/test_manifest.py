"""A bundle that is incomplete, altered or newer is refused before anything of it is used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headfold.runtime import BundleError, load

Damage = Callable[[Path], object]


def edit(**fields: Any) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(content | fields))

    return damage


def change_byte(path: Path) -> None:
    content = bytearray((path / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.onnx.data").write_bytes(content)


def link(path: Path) -> None:
    target = path.parent / "elsewhere.json"
    (path / "tokenizer.json").rename(target)
    (path / "tokenizer.json").symlink_to(target)


def link_directory(path: Path) -> None:
    (path / "more").symlink_to(path.parent)


def drop_field(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    del content["cache"]["capacity"]
    (path / "manifest.json").write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "one bit": (change_byte, r"model\.onnx\.data: does not have the SHA-256"),
    "longer": (lambda p: (p / "model.onnx").open("ab").write(b"x"), r"model\.onnx: has \d+ bytes, not the \d+"),
    "missing": (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json: is missing"),
    "extra": (lambda p: (p / "extra.py").write_text("x"), r"extra\.py: is not listed in the manifest"),
    "link": (link, r"tokenizer\.json: is missing, or no regular file"),
    "linked directory": (link_directory, r"more: is not listed in the manifest"),
    "newer": (edit(format_version=4), "format version 4, this headfold reads up to 3. Upgrade headfold"),
    "no JSON": (lambda p: (p / "manifest.json").write_bytes(b"\xff{"), "manifest.json: is not JSON"),
    "no object": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: manifest: Input should be"),
    "field missing": (drop_field, r"cache\.capacity: Field required"),
    "unknown dtype": (edit(dtype="int3"), "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
    "outside": (edit(files={"../x": {"size": 1, "sha256": "0" * 64}}), "points outside the bundle"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "no directory": (lambda p: shutil.rmtree(p), r"no such bundle directory\. Make one: `headfold export"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_refused(name: str, toy, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(toy.path, path)
    load(path)  # whole
    damage, message = DAMAGES[name]
    damage(path)
    with pytest.raises(BundleError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_unchecked_loading_is_possible(toy, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(toy.path, path)
    (path / "note.txt").write_text("mine")
    assert load(path, check=False).generate([5], max_new_tokens=1).token_ids == toy.greedy([5], 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.onnx": "no graph"}, "ONNX Runtime cannot load it"),
        ({"tokenizer.json": "{}"}, "is no tokenizer"),
        ({"tokenizer_config.json": "[]"}, "is no JSON object"),
        ({"generation_config.json": "{"}, "is not JSON"),
        ({"chat_template.jinja": "{% if %}"}, "its chat template is broken"),
    ],
)
def test_files_that_cannot_be_used_are_named(files, message: str, changed) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load(changed(files))
    assert "\n" not in str(caught.value)


def test_a_graph_of_another_model_is_refused(toy, changed) -> None:
    inputs = json.loads((toy.path / "manifest.json").read_text())["inputs"]
    with pytest.raises(BundleError, match="its inputs are not those of the manifest"):
        load(changed({}, inputs=inputs[:-1]))
