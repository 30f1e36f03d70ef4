"""A mask of every usual encoding marks the same pixels, and bad ones are refused in one sentence."""

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import Images, Item, load_mask

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
MASK = np.zeros((8, 8), dtype=bool)
MASK[2:4, 2:6] = True


def palette_mask(indices, colours):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colours)
    return image


MASKS = {
    "0-255": Image.fromarray(MASK * np.uint8(255)),
    "0-1": Image.fromarray(MASK.astype(np.uint8)),
    "one-bit": Image.fromarray(MASK),
    "palette": palette_mask(MASK, [0, 0, 0, 128, 0, 0]),
    "palette-black-last": palette_mask(~MASK, [0, 0, 128, 0, 0, 0]),
    "16-bit-ones": Image.fromarray(MASK.astype(np.uint16)),
    "RGB": Image.fromarray(MASK[..., None] * np.array([0, 0, 9], np.uint8)),
    "opaque": Image.fromarray(np.dstack([MASK * np.uint8(7), np.full((8, 8), 255, np.uint8)])),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_this_encoding_marks_the_same_pixels(tmp_path, name):
    MASKS[name].save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png", 8)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(MASK.astype(np.float32) / 4),
        Image.fromarray(MASK.astype(np.int32) << 20),
        Image.merge(
            "CMYK", [Image.new("L", (8, 8))] * 3 + [Image.fromarray(~MASK * np.uint8(255))]
        ),
    ],
    ids=["F", "I", "CMYK"],
)
def test_a_mask_of_a_mode_that_only_tiff_has_marks_the_same_pixels(tmp_path, mask):
    mask.save(tmp_path / "m.tif")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.tif", 8), MASK)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_a_mask_array_is_resized_to_the_nearest_pixel(dtype):
    doubled = MASK.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(load_mask(MASK.astype(dtype), 16), doubled)
    np.testing.assert_array_equal(load_mask(doubled.astype(dtype), 8), MASK)
    middle = np.array([[0, 1, 0]] * 3).astype(dtype)
    assert not load_mask(middle, 2).any()


def test_a_mask_array_that_is_none_is_refused():
    with pytest.raises(TypeError, match="bool or integer, got float64"):
        load_mask(MASK.astype(float), 8)
    with pytest.raises(ValueError, match=r"\(H, W\), got \(8, 8, 1\)"):
        load_mask(MASK[..., None], 8)
    with pytest.raises(ValueError, match=r"\(H, W\), got \(0, 8\)"):
        load_mask(MASK[:0], 8)
    assert load_mask(np.ones((1, 1), bool), 2).all()


def test_a_mask_of_another_size_than_its_image_is_refused_naming_both(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    item = Item("scar/0", 1, "scar", tmp_path / "image.png", tmp_path / "mask.png")
    sentence = r"mask .*mask\.png is 8x8 pixels, its image .*image\.png is 9x6$"
    with pytest.raises(ValueError, match=sentence):
        Images([item], 8).mask(0)


def test_an_image_turned_by_exif_fits_the_mask_drawn_on_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "i.png", exif=exif)
    assert (
        Images([Item("x", 1, "x", tmp_path / "i.png", np.ones((9, 6), bool))], 4).mask(0)
        is not None
    )


def test_a_mask_folder_marks_what_any_of_its_files_marks(tmp_path):
    left, right = MASK.copy(), MASK.copy()
    left[:, 4:], right[:, :4] = False, False
    for i, part in enumerate((left, right)):
        Image.fromarray(part * np.uint8(90 + i)).save(tmp_path / f"00{i}.png")
    (tmp_path / "notes.txt").write_text("no mask")
    np.testing.assert_array_equal(load_mask(tmp_path, 8), MASK)


def test_a_mask_folder_that_makes_no_mask_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder of 0 images"):
        load_mask(tmp_path, 8)
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    Image.new("L", (8, 9)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"is a folder of 2 images, not all of one size"):
        load_mask(tmp_path, 8)
