"""A bundle that is incomplete, altered, newer or absurd is refused before anything of it is used; one from a hub is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hub_cache import hub_snapshot

from headfold.export.exportables.opening import open_exportable
from headfold.export.parity.verify import verify
from headfold.export.progress import Reporter
from headfold.runtime import BundleError, load
from headfold.runtime.files.graph_file import check_capacity, initializer_shapes
from headfold.runtime.manifest import NEWEST_VERSION

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


def link_elsewhere(path: Path) -> None:
    target = path.parent / "elsewhere.json"
    target.write_bytes((path / "tokenizer.json").read_bytes().replace(b"fox", b"cat") + b" ")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to(target)


def pipe(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    os.mkfifo(path / "tokenizer.json")


def without(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        content = json.loads((path / "manifest.json").read_text())
        del content["files"][name]
        (path / "manifest.json").write_text(json.dumps(content))

    return damage


def with_engine(**changes: Any) -> Damage:
    """An engine whose entry names a file, and maybe kernels, that the manifest does not vouch for."""

    def damage(path: Path) -> None:
        entry = {"flavour": "tensorrt-rtx", "version": "1", "attention": "native", "dtype": "float32"}
        entry |= {
            "compute_capabilities": [86],
            "max_batch": 1,
            "max_input": 1,
            "capacity": 8,
            "weight_streaming": False,
        }
        entry |= {"profiles": [], "inputs": [], "outputs": [], "aliases": {}, "plugin": None, "layers": {}, "tools": {}}
        edit(format_version=2, engines=[entry | changes])(path)

    return damage


def plugin(kernels: str) -> dict[str, Any]:
    return {"name": "x", "version": "1", "namespace": "", "kernels": kernels, "kernels_sha256": "0" * 64}


def edit_cache(**fields: Any) -> Damage:
    def damage(path: Path) -> None:
        cache = json.loads((path / "manifest.json").read_text())["cache"]
        edit(cache=cache | fields)(path)

    return damage


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
    "link to another file": (link_elsewhere, r"tokenizer\.json: has \d+ bytes, not the"),
    "pipe": (pipe, r"tokenizer\.json: is missing, or no regular file"),
    "linked directory": (link_directory, r"more: is not listed in the manifest"),
    "newer": (
        edit(format_version=NEWEST_VERSION + 1),
        f"format version {NEWEST_VERSION + 1}, this headfold reads up to {NEWEST_VERSION}. Upgrade headfold",
    ),
    "no JSON": (lambda p: (p / "manifest.json").write_bytes(b"\xff{"), "manifest.json: is not JSON"),
    "no object": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: is no JSON object"),
    "field missing": (drop_field, r"cache\.capacity: Field required"),
    "unknown dtype": (edit(dtype="int3"), "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
    "outside": (edit(files={"../x": {"size": 1, "sha256": "0" * 64}}), "points outside the bundle"),
    "outside by a drive": (edit(files={"C:x": {"size": 1, "sha256": "0" * 64}}), "points outside the bundle"),
    "no graph": (without("model.onnx"), r"model\.onnx is not among its files"),
    "format 0": (edit(format_version=0), "format_version: Input should be greater than or equal to 1"),
    "format -1": (edit(format_version=-1), "format_version: Input should be greater than or equal to 1"),
    "format true": (edit(format_version=True), "format_version: Input should be a valid integer"),
    "a number as text": (edit(vocab_size="300"), "vocab_size: Input should be a valid integer"),
    "engine outside": (with_engine(file="../x.engine"), r"engines\.0\.file: .*points outside the bundle"),
    "engine without SHA-256": (with_engine(file="x.engine"), r"x\.engine is not among its files"),
    "kernels outside": (
        with_engine(file="model.onnx", plugin=plugin("/tmp")),
        r"plugin\.kernels: .*points outside the bundle",
    ),
    "kernels without SHA-256": (
        with_engine(file="model.onnx", plugin=plugin("k")),
        r"k/kernels\.json is not among its files",
    ),
    "more layers than tensors": (edit_cache(num_hidden_layers=10**9), "no two tensors for each of 1000000000 layers"),
    "escapes": (edit(**{"\x1b[2J[bold]": 1}), "\ufffd\\[2J\\[bold\\]: Extra inputs"),
    "nested": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "manifest.json: is nested too deeply"),
    "huge": (
        lambda p: (p / "manifest.json").open("ab").truncate(10**8),
        r"manifest\.json: has 100,000,000 bytes, and at most",
    ),
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
    assert str(caught.value).isprintable()
    assert caught.value.fix


def test_links_are_fine_where_the_sha256_is_right(toy, tmp_path: Path) -> None:
    assert load(hub_snapshot(toy.path, tmp_path)).generate([5], max_new_tokens=1).token_ids == toy.greedy([5], 1)


def test_what_a_hub_adds_is_fine(toy, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(toy.path, path)
    for name in (".gitattributes", "README.md", ".cache/huggingface/download/model.onnx.metadata", ".git/HEAD"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    load(path)
    (path / "more").mkdir()
    (path / "more" / "README.md").write_text("x")
    with pytest.raises(BundleError, match=r"more/README\.md: is not listed"):
        load(path)


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
        ({"tokenizer.json": "[" * 10**6}, "is no tokenizer"),
        ({"tokenizer_config.json": "[" * 10**6}, "is nested too deeply"),
        ({"special_tokens_map.json": "[1]"}, "is no JSON object"),
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
        load(changed({}, inputs=inputs[::-1]))


CACHE = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "capacity": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vocab_size": 10**12},
            r"logits is not the manifest's tensor\(float\) with 1000000000000 on axis 2.*1, 300\]",
        ),
        ({"vocab_size": 299}, "logits is not the manifest's"),
        ({"logits": "all"}, "its logits are not those of all tokens"),
        ({"dtype": "float16"}, r"logits is not the manifest's tensor\(float16\)"),
        ({"cache": CACHE | {"num_key_value_heads": 1}}, r"past_key_values\.0\.key is not the manifest's"),
        ({"cache": CACHE | {"head_dim": 2**40}}, r"past_key_values\.0\.key is not the manifest's"),
        ({"cache": CACHE | {"capacity": 65}}, "its rotary tables cover 64 tokens, not the manifest's capacity of 65"),
        ({"cache": CACHE | {"capacity": 2**60}}, "its rotary tables cover 64 tokens"),
        ({"cache": CACHE | {"quantization": {"dtype": "int8", "calibration_tokens": 1, "kl": 0, "top1": 1}}}, "int8"),
    ],
)
def test_what_the_manifest_says_of_the_graph_is_held_to_the_graph(fields, message, changed) -> None:
    with pytest.raises(BundleError, match=message):
        load(changed({}, **fields), threads=1)


def test_shapes_of_initializers_are_those_that_onnx_reads(toy) -> None:
    expected = onnx.load(toy.path / "model.onnx", load_external_data=False).graph.initializer
    assert initializer_shapes(toy.path / "model.onnx") == {tensor.name: tuple(tensor.dims) for tensor in expected}


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\x7f", b"\x3b", b"\x80"])
def test_what_is_no_graph(content, tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="is no ONNX graph"):
        check_capacity(tmp_path / "model.onnx", 1)


@pytest.mark.parametrize("content", ["no graph", ""])
def test_verifying_a_graph_that_cannot_be_loaded_is_one_line(content, changed, toy_checkpoint) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: (onnx cannot load it|its inputs are not)"):
        verify(changed({"model.onnx": content}), lambda _: open_exportable(toy_checkpoint), 1, Reporter(quiet=True))


def test_verifying_a_bundle_from_before_recipes_says_so(changed, toy, toy_checkpoint) -> None:
    old = onnx.load(toy.path / "model.onnx", load_external_data=False)
    for value in (*old.graph.initializer, *old.graph.value_info):
        del value.metadata_props[:]
    bundle = changed({"model.onnx": old.SerializeToString()})
    with pytest.raises(BundleError, match=r"was exported by an older headfold.* Export it again\.$"):
        verify(bundle, lambda _: open_exportable(toy_checkpoint), 1, Reporter(quiet=True))
