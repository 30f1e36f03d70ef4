"""`check_dataset` checks the pixels of any data set, also one made of arrays."""

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import DataSet, Item, check_dataset

RNG = np.random.default_rng(0)


def test_a_data_set_without_training_images_is_a_fault():
    image = np.full((4, 4), 9, np.uint8)
    test = Item("scar/0", 1, "scar", image), Item("scar/1", 1, "scar", image[:3])
    report = check_dataset(DataSet("set", "part", (), test))
    assert report.faults == ("there are no images to train on",)
    assert report.warnings == (
        "all test images are defective, so no image metrics will be computed",
        "2 of 2 defects have no mask, so no pixel metrics will be computed",
    )


def test_a_data_set_without_test_images_is_warned_of():
    train = (Item("train/good/0", 0, "good", np.full((4, 4), 9, np.uint8)),)
    report = check_dataset(DataSet("set", "part", train, ()))
    assert report.faults == ()
    assert report.warnings == ("there are no images to test on, so no metrics will be computed",)


def test_a_good_image_with_a_mask_is_warned_of():
    image, mask = np.full((4, 4), 9, np.uint8), np.eye(4, dtype=bool)
    train = (Item("train/good/0", 0, "good", image + np.uint8(1)),)
    test = Item("good/0", 0, "good", image, mask), Item("scar/0", 1, "scar", image[:3], mask[:3])
    report = check_dataset(DataSet("set", "part", train, test))
    assert report.faults == ()
    assert report.warnings == ("the mask of the good image good/0 is not empty",)


def test_duplicates_are_found_across_file_formats_and_modes(tmp_path):
    gray = Image.fromarray(RNG.integers(0, 256, (5, 6), dtype=np.uint8))
    gray.save(tmp_path / "a.png")
    gray.convert("RGB").save(tmp_path / "b.bmp")
    gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    items = [Item(f"x/{n}", 0, "good", tmp_path / n) for n in ("a.png", "b.bmp", "c.png")]
    found = check_dataset(DataSet("set", "part", (items[0],), tuple(items[1:]))).warnings
    assert "2 images with the same pixels in train and test: x/a.png, x/b.bmp" in found
    assert len(found) == 2


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more"), (8, " and 3 more")])
def test_long_lists_are_cut(count, more):
    image = np.full((4, 4), 9, np.uint8)
    train = tuple(Item(f"{i}", 0, "good", image) for i in range(count))
    (warning,) = check_dataset(DataSet("set", "part", train, ())).warnings[1:]
    assert warning == f"{count} images with the same pixels in train: 0, 1, 2, 3, 4{more}"


def test_a_valid_mask_of_a_broken_image_is_not_a_second_fault(tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    test = Item("scar/0", 1, "scar", tmp_path / "broken.png", np.ones((4, 4), bool))
    train = Item("train/good/0", 0, "good", np.full((4, 4), 9, np.uint8))
    (fault,) = check_dataset(DataSet("set", "part", (train,), (test,))).faults
    assert "broken.png is not an image" in fault


def warnings_of(item, **options):
    """Return the warnings of one defect, beside a good image to train on and one to test on."""
    images = (np.full((4, 4), gray, np.uint8) for gray in (1, 2))
    train, good = (Item(f"good/{i}", 0, "good", image) for i, image in enumerate(images))
    report = check_dataset(DataSet("set", "part", (train,), (good, item)), **options)
    assert report.faults == ()
    return list(report.warnings)


NOISE = RNG.integers(0, 256, (24, 24), dtype=np.uint8)
SPOT = np.zeros((24, 24), bool)
SPOT[4:12, 4:12] = True


@pytest.mark.family("masks")
def test_a_hard_mask_of_the_right_size_gives_no_warning(tmp_path):
    Image.fromarray(SPOT * np.uint8(255)).save(tmp_path / "m.png")
    for mask in (SPOT, tmp_path / "m.png"):
        assert warnings_of(Item("scar/0", 1, "scar", NOISE, mask), size=24) == []


@pytest.mark.family("image files")
@pytest.mark.parametrize("name", ["0.tif", "0.webp", "0.png"])
def test_a_file_of_several_images_is_warned_of_by_name(tmp_path, name):
    first = Image.fromarray(NOISE)
    more = [first.rotate(90), first.rotate(180)]
    first.save(tmp_path / name, save_all=True, append_images=more)
    item = Item("scar/0", 1, "scar", tmp_path / name, SPOT)
    sentence = "1 files hold several images, of which the first is read: "
    assert warnings_of(item) == [f"{sentence}{tmp_path / name} (3)"]


@pytest.mark.family("image files")
@pytest.mark.parametrize("bits", [10, 12])
def test_16_bit_files_that_hold_fewer_bits_are_warned_of(tmp_path, bits):
    levels = RNG.integers(0, 2**bits, (24, 24), dtype=np.uint16)
    levels[0, 0] = 2**bits - 1
    Image.fromarray(levels).save(tmp_path / "a.png")
    share = {10: "1.6%", 12: "6.3%"}[bits]
    sentence = f"1 images have 16 bits (65535 is white) and reach at most {share} of white: scar/0"
    for image in (levels, tmp_path / "a.png"):
        assert warnings_of(Item("scar/0", 1, "scar", image, SPOT)) == [sentence]
    for bright in (levels << (16 - bits), NOISE // np.uint8(16)):  # 8 bits may be dark
        assert warnings_of(Item("scar/0", 1, "scar", bright, SPOT)) == []


@pytest.mark.family("image files")
def test_16_bit_colors_that_hold_fewer_bits_are_warned_of(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    levels = RNG.integers(0, 4096, (24, 24, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb")
    (warning,) = warnings_of(Item("scar/0", 1, "scar", tmp_path / "a.tif", SPOT))
    assert warning.startswith("1 images have 16 bits (65535 is white) and reach at most 5.9% of")


@pytest.mark.family("masks")
def test_a_mask_that_is_cut_at_half_is_warned_of(tmp_path):
    Image.fromarray(SPOT * np.uint8(255)).save(tmp_path / "m.jpg", quality=75)
    sentence = (
        "1 masks have soft outlines, which are cut at half of the mask's largest level: scar/0"
    )
    assert warnings_of(Item("scar/0", 1, "scar", NOISE, tmp_path / "m.jpg")) == [sentence]


@pytest.mark.family("masks")
def test_an_inverted_mask_is_warned_of():
    sentence = "1 masks mark more than half of their image; black must mean normal: scar/0"
    assert warnings_of(Item("scar/0", 1, "scar", NOISE, ~SPOT)) == [sentence]


@pytest.mark.family("masks")
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_an_image_rotated_by_exif_without_its_mask_is_warned_of(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, pixels in (("i.png", NOISE), ("m.png", SPOT)):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    turned = Item("scar/0", 1, "scar", tmp_path / "i.png", SPOT)
    sentence = (
        "1 images are rotated by EXIF and their masks are not; a mask must fit the rotated image: "
        "scar/0"
    )
    assert warnings_of(turned) == [sentence] * (orientation > 1)
    assert warnings_of(Item("scar/0", 1, "scar", tmp_path / "i.png", tmp_path / "m.png")) == []


@pytest.mark.family("masks")
def test_a_defect_smaller_than_a_pixel_of_the_model_is_warned_of():
    thin = np.zeros((24, 24), bool)
    thin[:, 0] = True
    item = Item("scar/0", 1, "scar", NOISE, thin)
    assert warnings_of(item) == warnings_of(item, size=24) == []
    sentence = "1 masks have regions that are smaller than a pixel at size 6: scar/0"
    assert warnings_of(item, size=6) == warnings_of(item, size=6, fit="pad") == [sentence]
    for options in ({"size": 0}, {"size": 6, "fit": "crop"}):
        with pytest.raises(ValueError, match=r"^(size|fit) must be"):
            warnings_of(item, **options)
