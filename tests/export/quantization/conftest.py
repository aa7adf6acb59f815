"""Bundles with rounded weights that several files look at. Not to be changed: copy them."""

from pathlib import Path

import pytest
import torch
from block_models import CONFIG, checkpoint, exported

from headfold.export.checkpoints.hf_writer import save_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rounded") / "source"
    save_hf(path, checkpoint(CONFIG), torch.float32)
    return path


@pytest.fixture(scope="module")
def bundle(source) -> Path:
    return exported(source, source.parent / "int4", "--weights", "int4", "--rounding", "nearest")


@pytest.fixture(scope="module")
def mixed(source) -> Path:
    return exported(source, source.parent / "mixed", "--weights", "mixed", "--bits", "6")
