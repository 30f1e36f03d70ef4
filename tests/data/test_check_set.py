"""`check_dataset` looks at the pixels of any set, whoever made it."""

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import DataSet, Item, check_dataset

RNG = np.random.default_rng(0)


def test_a_set_without_training_images_is_at_fault():
    image = np.full((4, 4), 9, np.uint8)
    test = Item("scar/0", 1, "scar", image), Item("scar/1", 1, "scar", image[:3])
    report = check_dataset(DataSet("set", "part", (), test))
    assert report.faults == ("there are no images to train on",)
    assert report.warnings == (
        "all test images are defective, so no images will be measured",
        "2 of 2 defects have no mask, so no pixels will be measured",
    )


def test_a_set_without_test_images_is_warned_of():
    train = (Item("train/good/0", 0, "good", np.full((4, 4), 9, np.uint8)),)
    report = check_dataset(DataSet("set", "part", train, ()))
    assert report.faults == ()
    assert report.warnings == ("there are no images to test on, so nothing will be measured",)


def test_a_marked_good_image_is_warned_of():
    image, mask = np.full((4, 4), 9, np.uint8), np.ones((4, 4), bool)
    train = (Item("train/good/0", 0, "good", image + np.uint8(1)),)
    test = Item("good/0", 0, "good", image, mask), Item("scar/0", 1, "scar", image[:3], mask[:3])
    report = check_dataset(DataSet("set", "part", train, test))
    assert report.faults == ()
    assert report.warnings == ("the mask of the good image good/0 marks something",)


def test_the_same_pixels_are_found_in_files_of_other_formats_and_modes(tmp_path):
    gray = Image.fromarray(RNG.integers(0, 256, (5, 6), dtype=np.uint8))
    gray.save(tmp_path / "a.png")
    gray.convert("RGB").save(tmp_path / "b.bmp")
    gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    items = [Item(f"x/{n}", 0, "good", tmp_path / n) for n in ("a.png", "b.bmp", "c.png")]
    found = check_dataset(DataSet("set", "part", (items[0],), tuple(items[1:]))).warnings
    assert "2 images of the same pixels in train and test: x/a.png, x/b.bmp" in found
    assert len(found) == 2


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more"), (8, " and 3 more")])
def test_long_lists_are_cut(count, more):
    image = np.full((4, 4), 9, np.uint8)
    train = tuple(Item(f"{i}", 0, "good", image) for i in range(count))
    (warning,) = check_dataset(DataSet("set", "part", train, ())).warnings[1:]
    assert warning == f"{count} images of the same pixels in train: 0, 1, 2, 3, 4{more}"


def test_a_sound_mask_of_a_broken_image_is_no_second_fault(tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    test = Item("scar/0", 1, "scar", tmp_path / "broken.png", np.ones((4, 4), bool))
    train = Item("train/good/0", 0, "good", np.full((4, 4), 9, np.uint8))
    (fault,) = check_dataset(DataSet("set", "part", (train,), (test,))).faults
    assert "broken.png is not an image" in fault
