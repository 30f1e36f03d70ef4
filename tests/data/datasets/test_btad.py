"""The layout of BTAD has the folders ok and ko, and files of bmp and png."""

import pytest

from msflow_ext.data import Images, list_categories, open_dataset


@pytest.fixture
def root(tmp_path, save):
    for name in ("01", "02", "03"):
        for i in range(2):
            save(tmp_path / name / f"train/ok/000{i}.bmp")
        save(tmp_path / name / "test/ok/0000.png")
        save(tmp_path / name / "test/ko/0001.bmp")
        save(tmp_path / name / "test/ko/0002.png")
        save(tmp_path / name / "ground_truth/ko/0001.png", 255)
        save(tmp_path / name / "ground_truth/ko/0002.bmp", 255)
    return tmp_path


def test_ok_is_good_and_ko_has_masks_of_any_suffix(root):
    data = open_dataset(root, "btad", "02")
    assert (data.name, data.category) == ("btad", "02")
    assert [item.name for item in data.train] == ["train/good/0000", "train/good/0001"]
    found = [(item.name, item.label, item.defect) for item in data.test]
    assert found == [("ko/0001", 1, "ko"), ("ko/0002", 1, "ko"), ("good/0000", 0, "good")]
    masks = [Images(data.test, 4).mask(i) for i in range(3)]
    assert [mask is not None and bool(mask.all()) for mask in masks] == [True, True, False]


def test_the_products_are_the_categories(root):
    assert list_categories(root, "btad") == ["01", "02", "03"]
    with pytest.raises(ValueError, match=r"must be one of 01, 02, 03, got '04'"):
        open_dataset(root, "btad", "04")


def test_a_mask_without_its_image_is_named(root):
    (root / "01/test/ko/0002.png").unlink()
    with pytest.raises(ValueError, match=r"mask .*0002\.bmp has no image of the same name$"):
        open_dataset(root, "btad", "01")


def test_a_tree_of_mvtec_is_not_read_as_btad(tmp_path, save):
    save(tmp_path / "01/train/good/0.png")
    save(tmp_path / "01/test/good/0.png")
    with pytest.raises(FileNotFoundError, match=r"train.ok is not a folder"):
        open_dataset(tmp_path, "btad", "01")
