"""The layout of MVTec AD is read in sorted order, and missing files are named."""

import shutil

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import Images, list_categories, open_dataset


def save(path, value=100, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """Write two categories; the images of `bottle` have all kinds of suffixes."""
    bottle = tmp_path / "bottle"
    for name in ("002.png", "000.PNG", "001.jpg"):
        save(bottle / "train/good" / name)
    (bottle / "train/good/notes.txt").write_text("not an image")
    (bottle / "train/good/._000.png").write_bytes(b"what a Mac leaves behind")
    save(bottle / "test/good/000.Tiff")
    for name in ("001.webp", "000.bmp"):
        save(bottle / "test/crack" / name)
    save(bottle / "test/stain/000.jpeg")
    save(bottle / "ground_truth/crack/000_mask.png", 255)
    save(bottle / "ground_truth/crack/001.png", 1)
    save(bottle / "ground_truth/stain/000_mask.png", 255)
    save(tmp_path / "cable/train/good/000.png")
    save(tmp_path / "cable/test/good/000.png")
    return tmp_path


def test_a_category_is_read_in_sorted_order_with_its_masks(root):
    data = open_dataset(root, "mvtec", "bottle")
    assert (data.name, data.category) == ("mvtec", "bottle")
    assert [item.name for item in data.train] == [f"train/good/00{i}" for i in range(3)]
    found = [(item.name, item.label, item.defect) for item in data.test]
    assert found == [
        ("crack/000", 1, "crack"),
        ("crack/001", 1, "crack"),
        ("good/000", 0, "good"),
        ("stain/000", 1, "stain"),
    ]
    truth = root / "bottle/ground_truth"
    assert [item.mask for item in data.test] == [
        truth / "crack/000_mask.png",
        truth / "crack/001.png",
        None,
        truth / "stain/000_mask.png",
    ]
    assert all(item.label == 0 and item.mask is None for item in data.train)


def test_every_item_decodes_and_every_mask_fits(root):
    images = Images(open_dataset(root, "mvtec", "bottle").test, 4)
    marked = [images.mask(i) for i in range(len(images))]
    assert [mask is not None and bool(mask.all()) for mask in marked] == [True, True, False, True]
    assert np.isclose(images[0].numpy(), 100 / 255).all()


def test_the_category_folder_itself_can_be_the_data(root):
    category = open_dataset(root / "bottle", "mvtec")
    assert category == open_dataset(root, "mvtec", "bottle")


@pytest.mark.parametrize("category", ["botle", None, "..", "bottle/train"])
def test_an_unknown_category_lists_those_that_exist(root, category):
    with pytest.raises(ValueError, match=rf"must be one of bottle, cable, got {category!r}"):
        open_dataset(root, "mvtec", category)


def test_a_folder_without_categories_is_refused_with_their_description(tmp_path):
    with pytest.raises(ValueError, match=r"must hold categories.*, got category 'bottle'"):
        open_dataset(tmp_path, "mvtec", "bottle")


def test_missing_training_images_are_named(root):
    (root / "cable/train/good/000.png").unlink()
    with pytest.raises(ValueError, match=r"good holds no images \(png, jpg"):
        open_dataset(root, "mvtec", "cable")
    (root / "cable/train/good").rmdir()
    with pytest.raises(FileNotFoundError, match=r"cable.train.good is not a folder"):
        open_dataset(root, "mvtec", "cable")


def test_missing_test_images_are_named(root):
    (root / "cable/test/good/000.png").unlink()
    with pytest.raises(ValueError, match=r"test.good holds no images"):
        open_dataset(root, "mvtec", "cable")
    (root / "cable/test/good").rmdir()
    with pytest.raises(ValueError, match=r"cable.test holds no folder of images"):
        open_dataset(root, "mvtec", "cable")


def test_without_any_ground_truth_the_masks_are_none(root):
    for mask in (root / "bottle/ground_truth").rglob("*.png"):
        mask.unlink()
    for folder in ("crack", "stain", ""):
        (root / "bottle/ground_truth" / folder).rmdir()
    assert all(item.mask is None for item in open_dataset(root, "mvtec", "bottle").test)


def test_a_single_missing_mask_is_named(root):
    (root / "bottle/ground_truth/crack/001.png").unlink()
    with pytest.raises(ValueError, match=r"001\.webp has no mask: .*crack holds neither 001_mask"):
        open_dataset(root, "mvtec", "bottle")


def test_two_images_of_one_stem_are_refused(root):
    save(root / "bottle/train/good/001.bmp")
    with pytest.raises(ValueError, match=r"both 001\.bmp and 001\.jpg"):
        open_dataset(root, "mvtec", "bottle")


def test_a_mask_without_its_image_is_named(root):
    save(root / "bottle/ground_truth/crack/007_mask.png", 255)
    with pytest.raises(
        ValueError, match=r"mask .*crack.007_mask\.png has no image of the same name"
    ):
        open_dataset(root, "mvtec", "bottle")


def test_masks_of_an_unknown_kind_of_defect_are_named(root):
    save(root / "bottle/ground_truth/hole/000_mask.png", 255)
    with pytest.raises(
        ValueError, match=r"masks .*hole have no images: .*test.hole is not a folder"
    ):
        open_dataset(root, "mvtec", "bottle")


def test_masks_of_good_images_are_not_read(root):
    save(root / "bottle/ground_truth/good/000_mask.png", 0)
    assert open_dataset(root, "mvtec", "bottle").test[2].name == "good/000"


def test_the_categories_are_the_folders_with_images_to_train_on_or_to_test(root):
    (root / "licences").mkdir()
    shutil.rmtree(root / "cable/train")
    shutil.rmtree(root / "bottle/test")
    assert list_categories(root, "mvtec") == ["bottle", "cable"]
    assert list_categories(root / "bottle", "mvtec") == []


def test_hidden_folders_are_passed_over(root):
    before = open_dataset(root, "mvtec", "bottle")
    for name in (".cup/train/good", "bottle/test/.crack", "bottle/ground_truth/crack/.003"):
        save(root / name / "000.png")
    assert list_categories(root, "mvtec") == ["bottle", "cable"]
    assert open_dataset(root, "mvtec", "bottle") == before
