"""`open_dataset` refuses unknown names, and lists the known ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from msflow_ext.data import open_dataset


def test_an_unknown_layout_lists_those_that_exist(tmp_path):
    with pytest.raises(
        ValueError, match=r"one of mvtec, visa, btad, mtd, mstc, folder, got 'mvtek'"
    ):
        open_dataset(tmp_path, "mvtek")  # pyright: ignore[reportArgumentType]


def test_an_unknown_packaged_set_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"data 'elvp' .* data must be one of elpv, textures"):
        open_dataset("elvp", category="mono")


def test_a_packaged_set_has_no_layout():
    with pytest.raises(ValueError, match="data 'elpv' is a package and has no layout, got 'mvtec'"):
        open_dataset("elpv", "mvtec", "mono")


def test_a_folder_that_is_called_like_a_packaged_set_is_still_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elpv/normal").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "elpv/normal/a.png")
    assert open_dataset("./elpv", "folder") == open_dataset(Path("elpv"), "folder")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data .*nowhere is not a folder"):
        open_dataset(tmp_path / "nowhere", "mvtec", "bottle")


def test_missing_data_is_refused():
    with pytest.raises(ValueError, match="data must be a folder, got None"):
        open_dataset(None, "folder")


@pytest.mark.parametrize("layout", ["mvtec", None])
def test_folder_options_belong_to_layout_folder(tmp_path, layout):
    with pytest.raises(ValueError, match="normal, masks can only be given with layout 'folder'"):
        open_dataset(tmp_path, layout, normal="a", masks="b")


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_split_seed_that_is_not_a_whole_number_is_refused(seed):
    with pytest.raises(
        ValueError, match=f"split_seed must be a whole number from 0 up, got {seed}"
    ):
        open_dataset("textures", category="brick", split_seed=seed)


def test_importing_the_data_imports_no_image_library():
    code = (
        "import sys, msflow_ext.data; "
        "print([m for m in ('PIL', 'skimage', 'elpv_dataset', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_first_fault_is_raised_and_the_others_are_counted(tmp_path, save):
    for name in ("train/good/0.png", "train/good/0.bmp", "test/scar/1.png", "test/scar/2.png"):
        save(tmp_path / name)
    (tmp_path / "ground_truth/scar").mkdir(parents=True)
    sentence = r"both 0\.bmp and 0\.png; .* renamed \(2 more: run msflow data check\)$"
    with pytest.raises(ValueError, match=sentence):
        open_dataset(tmp_path, "mvtec")


def test_without_strict_valid_items_and_all_faults_are_kept(tmp_path, save):
    for name in ("train/good/0.png", "test/scar/1.png", "test/scar/2.png"):
        save(tmp_path / name)
    mask = save(tmp_path / "ground_truth/scar/2_mask.png", 255)
    save(tmp_path / "ground_truth/scar/3_mask.png", 255)
    data = open_dataset(tmp_path, "mvtec", strict=False)
    assert [type(fault) for fault in data.faults] == [ValueError, ValueError]
    assert [item.mask for item in data.test] == [None, mask]
    assert len(data.train) == 1
