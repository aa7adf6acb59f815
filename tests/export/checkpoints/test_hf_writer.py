"""Hugging Face directories, out: who may read them."""

import os

import pytest
import torch

from headfold.export.checkpoints.hf_writer import save_hf, save_tensors
from headfold.export.checkpoints.opening import open_checkpoint


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_have_the_permissions_of_the_users_umask(umask, mode, toy_checkpoint, tmp_path) -> None:
    before = os.umask(umask)
    try:
        save_hf(tmp_path / "c", open_checkpoint(toy_checkpoint), torch.float32)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {mode}


def test_what_the_system_refuses_safetensors_is_an_oserror(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    for path, kind in ((tmp_path / "no" / "t", FileNotFoundError), (tmp_path / "taken", IsADirectoryError)):
        with pytest.raises(kind) as caught:
            save_tensors({"a": torch.zeros(1)}, path)
        assert caught.value.filename == str(path)
