"""What is put into a bundle: it keeps all it has, and what others put there meanwhile."""

from pathlib import Path

import pytest
from least_bundle import fill

from headfold.export import publishing
from headfold.export.bundle.additions import adding
from headfold.export.bundle.writer import staged
from headfold.runtime import BundleError
from headfold.runtime.manifest import Manifest, check_files, read_manifest


@pytest.fixture
def bundle(tmp_path) -> Path:
    with staged(tmp_path / "b", force=False) as stage:
        fill(stage, 1)
    return tmp_path / "b"


def same(manifest: Manifest) -> Manifest:
    return manifest


def add(bundle: Path, name: str) -> None:
    with adding(bundle, same) as stage:
        (stage / name).write_text(name)


def test_what_two_add_at_once_is_there_afterwards(bundle) -> None:
    with adding(bundle, same) as first:
        (first / "a").write_text("a")
        add(bundle, "b")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert sorted(manifest.files) == ["a", "b", "model.onnx"]


def test_a_bundle_from_a_hub_keeps_the_hubs_files_and_its_links_become_files(bundle, tmp_path) -> None:
    (bundle / "model.onnx").rename(tmp_path / "blob")
    (bundle / "model.onnx").symlink_to("../blob")
    (bundle / "README.md").write_text("a card")
    add(bundle, "a")
    check_files(bundle, read_manifest(bundle))
    assert (bundle / "README.md").read_text() == "a card"
    assert (tmp_path / "blob").read_bytes() == b"graph"


def test_a_directory_is_replaced_as_a_whole(bundle) -> None:
    for name in ("old", "new"):
        with adding(bundle, same, instead_of="kernels") as stage:
            (stage / "kernels").mkdir()
            (stage / "kernels" / name).write_text(name)
    check_files(bundle, read_manifest(bundle))
    assert sorted(read_manifest(bundle).files) == ["kernels/new", "model.onnx"]


def test_a_bundle_that_is_gone_by_then_is_one_line(bundle, tmp_path) -> None:
    def late() -> None:
        with adding(bundle, same):
            bundle.rename(tmp_path / "moved")

    with pytest.raises(BundleError, match="b: is gone"):
        late()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_what_comes_at_the_last_moment_brings_the_old_one_back(bundle, monkeypatch) -> None:
    real = publishing.exchange

    def exchange(new: Path, old: Path) -> bool:
        if not (new / "late").exists():  # the first time
            (old / "late").write_text("theirs")
        return real(new, old)

    monkeypatch.setattr(publishing, "exchange", exchange)
    with pytest.raises(BundleError, match="got late just now"):
        add(bundle, "a")
    assert sorted(path.name for path in bundle.iterdir()) == ["late", "manifest.json", "model.onnx"]
