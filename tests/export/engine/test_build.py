"""Engines into bundles: what is built agrees with the manifest, a bundle stays a bundle, and bad input is one line and exit code 2."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.cli import main
from headfold.export.engine import network_report as tensorrt_network
from headfold.export.engine.build import build_engine
from headfold.export.engine.options import BuildOptions, check_flavour, check_weights, profiles
from headfold.export.exportables.own import OwnModel
from headfold.export.progress import Reporter
from headfold.plugins.tensorrt_library import TensorRTMissing
from headfold.runtime.errors import BuildError, BundleError
from headfold.runtime.files.engine_file import HEADER_BYTES, check_engine, read_header
from headfold.runtime.manifest import PluginEntry, check_files, read_manifest, sha256

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
ENGINE = "engines/tensorrt-rtx-native.engine"
SMALL = ["--sm", "86,120", "--max-batch", "2", "--max-input", "8", "--capacity", "16"]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code, and what is on standard error and output."""
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def built(tensorrt_toy, tmp_path_factory) -> Path:
    """A float16 bundle with a native engine, built by the command."""
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tensorrt_toy("float16").bundle, bundle)
    code, output = run("build", str(bundle), *SMALL, "--weight-streaming", "--workspace", "256", "-q")
    assert code == 0, output
    return bundle


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_the_engine_is_what_the_manifest_says(built) -> None:
    manifest = read_manifest(built)
    check_files(built, manifest)
    (entry,) = manifest.engines
    header = read_header(built / entry.file)
    assert header.size == (built / entry.file).stat().st_size == manifest.files[ENGINE].size
    assert header.version == entry.version
    assert header.compute_capabilities == entry.compute_capabilities == [86, 120]
    assert entry.layers == {"ROTARY_EMBEDDING": 4, "KV_CACHE_UPDATE": 4, "ATTENTION": 2}
    assert entry.aliases["present.1.value"] == "past_key_values.1.value"
    assert [profile.name for profile in entry.profiles] == ["prefill", "decode"]
    assert entry.profiles[0].shapes["input_ids"].max == [2, 8]
    assert entry.profiles[1].shapes["input_ids"].max == [2, 1]
    assert entry.profiles[1].shapes["past_key_values.0.key"].max == [2, 2, 16, 16]
    assert [spec.name for spec in entry.inputs] == [spec.name for spec in manifest.inputs]
    assert entry.inputs[0].shape == ["batch", "sequence"]
    assert entry.weight_streaming
    check_engine(built, entry)


def test_the_bundle_keeps_its_files_and_says_its_new_format(built, tensorrt_toy) -> None:
    before, after = tensorrt_toy("float16").manifest, read_manifest(built)
    assert after.format_version == 2
    assert {name: after.files[name] for name in before.files} == before.files
    assert before.format_version == 1
    assert before.engines == []


def test_onnx_runtime_still_opens_the_bundle(built) -> None:
    from headfold.runtime.session import OrtSession

    manifest = read_manifest(built)
    session = OrtSession(built, manifest)
    assert session.manifest.engines


def test_inspect_names_the_engine(built) -> None:
    code, output = run("inspect", str(built), "--json")
    assert code == 0, output
    assert "native attention, SM 86, 120, batch 2, input 8, capacity 16" in json.loads(output)["targets"][1]


def test_a_plugin_engine_brings_its_kernels(copy) -> None:
    pytest.importorskip("triton")
    options = BuildOptions(attention="plugin", compute_capabilities=(86,), max_batch=1, max_input=8)
    result = build_engine(copy, options, Reporter(quiet=True))
    assert [layer.layers for layer in result.layers] == [{"PLUGIN_V3": 1}] * 2
    manifest = read_manifest(copy)
    check_files(copy, manifest)
    assert [entry.attention for entry in manifest.engines] == ["native", "plugin"]
    plugin = manifest.engines[1].plugin
    assert plugin is not None
    assert plugin.kernels_sha256 == sha256(copy / plugin.kernels / "kernels.json")
    assert {name for name in manifest.files if name.endswith(".sm_86.cubin")}
    check_engine(copy, manifest.engines[1])


def test_a_failed_build_leaves_the_bundle_as_it_was(copy, monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    monkeypatch.setattr("headfold.export.engine.build._serialize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_engine(copy, BuildOptions(compute_capabilities=(86,), max_input=8, force=True), Reporter(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_float32_attention_is_decomposed(tensorrt_toy) -> None:
    toy = tensorrt_toy("float16")
    manifest = toy.manifest.model_copy(update={"dtype": "float32"})
    trt = tensorrt_network.open_flavour("tensorrt-rtx")
    from headfold.export.engine.build import lowered_network

    _, parsed = lowered_network(trt, toy.bundle, manifest, BuildOptions())
    inputs = [layer for layer in parsed.layers() if tensorrt_network.kind(layer) == "ATTENTION_INPUT"]
    assert [layer.attention.decomposable for layer in inputs] == [True, True]


@pytest.mark.parametrize(
    "heads",
    [
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 288},
    ],
    ids=["one head", "three heads", "heads of 288"],
)
def test_heads_that_no_fused_kernel_has_are_built_of_several(heads, config, memory_checkpoint, tmp_path) -> None:
    model = memory_checkpoint(replace(config, model_type="headfold", num_hidden_layers=1, **heads))
    options = ExportOptions(dtype="float16", capacity=16, verify=False)
    export_bundle(OwnModel(model), tmp_path / "b", options, Reporter(quiet=True))
    built = build_engine(tmp_path / "b", BuildOptions(compute_capabilities=(86,), max_input=8), Reporter(quiet=True))
    assert built.entry.layers["ATTENTION"] == 1


def kernels_of(stage: Path) -> PluginEntry:
    (stage / "kernels").mkdir()
    (stage / "kernels" / "kernels.json").write_text("{}")
    return PluginEntry(
        name="GroupedQueryAttention",
        version="1",
        namespace="headfold",
        kernels="kernels",
        kernels_sha256=sha256(stage / "kernels" / "kernels.json"),
    )


@pytest.fixture
def build_at_once(built, tensorrt_toy, tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Build the first kind of attention into a fresh bundle; the second begins and ends while TensorRT works on the first."""
    bundle = Path(shutil.copytree(tensorrt_toy("float16").bundle, tmp_path / "b"))

    def build(attention: str) -> None:
        options = BuildOptions(attention=attention, compute_capabilities=(86, 120), max_batch=2, max_input=8)
        build_engine(bundle, options, Reporter(quiet=True))

    def both(first: str, second: str) -> Path:
        begun = []

        def serialize(*_: object) -> bytes:
            begun.append(1)
            if len(begun) == 1:
                build(second)
            return (built / ENGINE).read_bytes()

        monkeypatch.setattr("headfold.export.engine.build._serialize", serialize)
        monkeypatch.setattr("headfold.export.engine.build._add_kernels", lambda stage, *_: kernels_of(stage))
        build(first)
        return bundle

    return both


@pytest.mark.parametrize(("first", "second"), [("native", "plugin"), ("plugin", "native")])
def test_two_builds_at_once_keep_both_engines(first, second, build_at_once) -> None:
    bundle = build_at_once(first, second)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert [entry.attention for entry in manifest.engines] == [second, first]
    assert {entry.file for entry in manifest.engines} | {"kernels/kernels.json"} <= set(manifest.files)


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_the_same_engine_built_twice_at_once_is_the_first_that_is_there(attention, build_at_once, tmp_path) -> None:
    with pytest.raises(BuildError, match=f"has a tensorrt-rtx engine with {attention} attention already"):
        build_at_once(attention, attention)
    manifest = read_manifest(tmp_path / "b")
    check_files(tmp_path / "b", manifest)
    assert [entry.attention for entry in manifest.engines] == [attention]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_profiles_hold_every_shape_that_serving_needs(tensorrt_toy) -> None:
    options = BuildOptions(max_batch=3, max_input=10)
    for profile in profiles(options, tensorrt_toy("float16").manifest):
        assert set(profile.shapes) == {spec.name for spec in tensorrt_toy("float16").manifest.inputs}
        for shapes in profile.shapes.values():
            assert all(a <= b <= c for a, b, c in zip(shapes.min, shapes.opt, shapes.max, strict=True))
        assert profile.shapes["attention_mask"].max == [3, 40]


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "GPU that the flavour does not build for": (
        ["--sm", "86,90"],
        "TensorRT-RTX does not build for SM 90. It knows 75",
    ),
    "no GPU": ([], "--sm: no GPU is named"),
    "GPU named twice": (["--sm", "86,86"], "86 is named twice"),
    "capacity over the bundle's": (["--sm", "86", "--capacity", "41"], "41 is not 1 to 40"),
    "capacity of nothing": (["--sm", "86", "--capacity", "0"], "0 is not 1 to 40"),
    "input over the capacity": (["--sm", "86", "--max-input", "41"], "41 new tokens do not fit a cache of 40"),
    "no batch": (["--sm", "86", "--max-batch", "0"], "--max-batch: is 0"),
    "no workspace": (["--sm", "86", "--max-input", "8", "--workspace", "0"], "--workspace: is 0 bytes"),
    "timing cache": (["--sm", "86", "--timing-cache", "t"], "--timing-cache: TensorRT-RTX times nothing"),
    "timing cache nowhere": (["--target", "tensorrt", "--timing-cache", "/nowhere/t"], "/nowhere: is no directory"),
    "engine there already": (
        ["--sm", "86", "--max-input", "8"],
        "has a tensorrt-rtx engine with native attention already",
    ),
    "GPUs of full TensorRT": (
        ["--target", "tensorrt", "--sm", "86", "--max-input", "8"],
        "the GPU it runs on, and no other",
    ),
    "full TensorRT without a GPU": (["--target", "tensorrt", "--max-input", "8"], "needs the GPU it builds for"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_one_line(case, built, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments, message = BAD_OPTIONS[case]
    code, output = run("build", str(built), *arguments, "-q")
    assert code == 2
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_turing_has_float16_alone(tensorrt_toy) -> None:
    code, output = run("build", str(tensorrt_toy("bfloat16").bundle), "--sm", "75", "--max-input", "8", "-q")
    assert code == 2
    assert "SM 75 has no bfloat16 arithmetic in TensorRT-RTX. Export the bundle with --dtype float16." in output
    turing = BuildOptions(compute_capabilities=(75,))
    check_flavour(turing, "float16")
    with pytest.raises(BuildError, match="SM 75 has no float32 arithmetic in TensorRT-RTX"):
        check_flavour(turing, "float32")
    check_weights(turing, "int8")
    with pytest.raises(
        BuildError, match=r"SM 75 has no int4 in TensorRT-RTX\. Export the bundle with --weights int8\."
    ):
        check_weights(turing, "mixed")


def test_export_refuses_an_impossible_target_before_it_reads_anything(tmp_path) -> None:
    arguments = ["export", str(tmp_path / "nothing"), "-o", str(tmp_path / "out"), "--target", "tensorrt-rtx"]
    code, output = run(*arguments, "--sm", "90")
    assert code == 2
    assert "TensorRT-RTX does not build for SM 90" in output
    code, output = run(*arguments, "--sm", "eighty")
    assert code == 2
    assert "no list of compute capabilities" in output


def test_a_bundle_that_is_not_there_is_one_line(tmp_path) -> None:
    code, output = run("build", str(tmp_path / "nothing"), "--sm", "86")
    assert code == 2
    assert "no such bundle directory" in output


def test_a_flavour_that_is_not_installed_is_one_line(copy, monkeypatch) -> None:
    def missing(_: str) -> None:
        raise TensorRTMissing("tensorrt-rtx is not installed: pip install tensorrt-rtx")

    monkeypatch.setattr(tensorrt_network, "open_tensorrt", missing)
    code, output = run("build", str(copy), "--sm", "86", "--max-input", "8", "--force", "-q")
    assert code == 2
    assert "target tensorrt-rtx: tensorrt-rtx is not installed" in output


def rehash(bundle: Path) -> None:
    """Make the manifest agree with the changed engine, as somebody would who wants it used all the same."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    path = bundle / ENGINE
    manifest["files"][ENGINE] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def patch(offset: int, content: bytes) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / ENGINE
        data = bytearray(path.read_bytes())
        data[offset : offset + len(content)] = content
        path.unlink()
        path.write_bytes(data)
        rehash(bundle)

    return change


def truncate(size: int) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / ENGINE).write_bytes((bundle / ENGINE).read_bytes()[:size])
        rehash(bundle)

    return change


def flip_without_rehash(bundle: Path) -> None:
    data = bytearray((bundle / ENGINE).read_bytes())
    data[5000] ^= 1
    (bundle / ENGINE).write_bytes(data)


BAD_ENGINES: dict[str, tuple[Callable[[Path], None], str]] = {
    "altered": (flip_without_rehash, "does not have the SHA-256 of the manifest"),
    "truncated": (truncate(-100), "is truncated or padded"),
    "not even a header": (truncate(HEADER_BYTES - 1), "not even a header's 64"),
    "no engine": (patch(0, b"ONNX"), "is no TensorRT-RTX engine"),
    "another version": (patch(24, bytes([1, 6, 0, 9])), "was built by TensorRT-RTX 1.6.0.9"),
    "other GPUs": (patch(32, struct.pack("<I", 8)), "is for SM 89, its manifest says 86, 120"),
    "missing": (lambda bundle: (bundle / ENGINE).unlink(), "is missing"),
}


def check(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    check_engine(bundle, manifest.engines[0])


@pytest.mark.parametrize("case", BAD_ENGINES)
def test_a_bad_engine_is_named_before_anybody_runs_it(case, copy) -> None:
    change, message = BAD_ENGINES[case]
    change(copy)
    with pytest.raises(BundleError) as error:
        check(copy)
    assert message in str(error.value)
    code, output = run("inspect", str(copy))
    if case == "altered":  # to inspect hashes nothing: a large bundle would take seconds
        assert code == 0
        return
    assert code == 2
    assert message in " ".join(output.split())
