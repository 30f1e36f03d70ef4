"""Checkpoints leave no temporary files, even if the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import nn

from msflow_ext.files import LOCK, locked
from msflow_ext.runs.checkpoint import previous, read_checkpoint, save_checkpoint


@pytest.mark.family("run files")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("then", ["saved again", "locked"])
def test_temporary_files_of_a_killed_writer_are_removed(tmp_path, monkeypatch, then):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"epoch": 1}, nn.Linear(2, 2))

    def killed(tensors: Any, target: Any, **_: Any) -> None:
        Path(target).with_name(".tmpa1b2c3").write_bytes(b"part")  # the name that safetensors uses
        os._exit(9)

    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(safetensors.torch, "save_file", killed)
            save_checkpoint(path, {"epoch": 2}, nn.Linear(2, 2))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert read_checkpoint(path)[0] == {"epoch": 1}
    assert list(tmp_path.rglob(".tmpa1b2c3"))
    if then == "locked":
        with locked(tmp_path):
            assert {each.name for each in tmp_path.rglob("*")} == {path.name, LOCK}
    else:
        save_checkpoint(path, {"epoch": 3}, nn.Linear(2, 2))
        assert {each.name for each in tmp_path.rglob("*")} == {path.name, previous(path).name}


@pytest.mark.family("folders")
def test_a_run_in_a_folder_whose_name_is_not_utf_8_is_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"Gu\xdf")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system allows only names in UTF-8")
    save_checkpoint(folder / "model.safetensors", {"epoch": 1}, nn.Linear(2, 2))
    header, tensors = read_checkpoint(folder / "model.safetensors")
    assert header == {"epoch": 1}
    assert tensors["weight"].shape == (2, 2)
