"""Images and masks of every usual encoding decode, and bad ones are refused in one sentence."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext.data import Images, Item, load_image, load_mask

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
BITS = RNG.random((6, 9)) < 0.4


def repeated(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def palette_image():
    image = Image.fromarray(GRAY % 4)
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50, 60, 70, 230])
    return image


PALETTE = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50], [60, 70, 230]], np.uint8)[GRAY % 4]

LOSSLESS = {
    "RGB.png": (Image.fromarray(RGB), RGB),
    "RGB.bmp": (Image.fromarray(RGB), RGB),
    "RGB.tiff": (Image.fromarray(RGB), RGB),
    "gray.png": (Image.fromarray(GRAY), repeated(GRAY)),
    "one-bit.png": (Image.fromarray(BITS), repeated(BITS * np.uint8(255))),
    "palette.png": (palette_image(), PALETTE),
    "palette.bmp": (palette_image(), PALETTE),
    "RGBA.png": (Image.fromarray(np.dstack([RGB, ALPHA])), RGB),
    "LA.png": (Image.fromarray(np.dstack([GRAY, ALPHA])), repeated(GRAY)),
    "16-bit.png": (Image.fromarray(SIXTEEN), repeated(np.rint(SIXTEEN / 257))),
    "16-bit.tif": (Image.fromarray(SIXTEEN), repeated(np.rint(SIXTEEN / 257))),
    "black-CMYK.tif": (Image.new("CMYK", (9, 6), (0, 0, 0, 255)), np.zeros((6, 9, 3))),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_file_of_this_mode_decodes_to_its_colours(tmp_path, name):
    image, expected = LOSSLESS[name]
    image.save(tmp_path / name)
    decoded = load_image(tmp_path / name)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_a_palette_with_transparent_entries_keeps_its_colours(tmp_path):
    palette_image().save(tmp_path / "p.png", transparency=b"\x00\x80\xff\x10")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "p.png")), PALETTE)
    nearest = Image.fromarray(GRAY % 4).resize((9, 9), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(load_mask(tmp_path / "p.png", 9), np.asarray(nearest) > 0)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_lossy_file_decodes_to_about_its_colours(tmp_path, suffix):
    Image.new("RGB", (16, 12), (200, 100, 50)).save(tmp_path / f"i.{suffix}")
    decoded = np.asarray(load_image(tmp_path / f"i.{suffix}")).astype(int)
    assert decoded.shape == (12, 16, 3)
    assert np.abs(decoded - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_the_exif_orientation_is_applied(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "i.png", exif=exif)
    expected = np.rot90(RGB, turns)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "i.png")), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GRAY, repeated(GRAY)),
        (RGB, RGB),
        (np.dstack([RGB, ALPHA]), RGB),
        (BITS, repeated(BITS * 255)),
        (SIXTEEN, repeated(np.rint(SIXTEEN / 257))),
        (RGB[:, ::-1], RGB[:, ::-1]),
    ],
    ids=["gray", "rgb", "rgba", "bool", "uint16", "mirrored"],
)
def test_an_array_is_shown_as_a_file_would_be(array, expected):
    np.testing.assert_array_equal(np.asarray(load_image(array)), expected)


def huge_png():
    """A header of 60000x60000 pixels and hardly anything behind it."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bytes_of(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix):
    whole = bytes_of(tmp_path, suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be decoded: .*"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.png is empty$"),
        (b"just some text, no pixels", r"bad\.png is not an image$"),
        (huge_png(), r"bad\.png cannot be decoded: .*decompression bomb"),
    ],
    ids=["empty", "text", "bomb"],
)
def test_a_file_that_is_no_sound_image_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / "bad.png", 8)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    content = bytearray(bytes_of(tmp_path, "png"))
    content[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.png cannot be decoded: "):
        load_image(tmp_path / "damaged.png")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_a_pixel_are_refused_because_white_is_unknown(tmp_path, dtype):
    Image.fromarray(GRAY.astype(dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif has 32 bits a pixel"):
        load_image(tmp_path / "deep.tif")


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png is not a file"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((4, 4), np.float32), TypeError, "bool, uint8 or uint16, got float32"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.uint16), ValueError, r"\(4, 4, 3\) of uint16"),
        (np.zeros((0, 4), np.uint8), ValueError, r"\(0, 4\)"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array, error, message):
    with pytest.raises(error, match=message):
        load_image(array)


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


def test_images_are_float_rgb_in_0_to_1_of_the_size_asked_for():
    images = Images([Item("a", 0, "good", RGB), Item("b", 0, "good", SIXTEEN)], 5)
    assert len(images) == 2
    for image in (images[0], images[1]):
        assert image.shape == (3, 5, 5)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert 0 <= image.min() < image.max() <= 1


def test_an_image_of_the_right_size_keeps_its_levels():
    square = RGB[:6, :6]
    expected = torch.from_numpy(square.transpose(2, 0, 1).copy()) / 255
    torch.testing.assert_close(
        Images([Item("a", 0, "good", square)], 6)[0], expected, rtol=0, atol=0
    )


def test_resizing_takes_lanczos():
    resized = Image.fromarray(RGB).resize((4, 4), Image.Resampling.LANCZOS)
    ours = Images([Item("a", 0, "good", RGB)], 4)[0].permute(1, 2, 0) * 255
    np.testing.assert_array_equal(ours.round().numpy(), np.asarray(resized))


def test_good_items_have_empty_masks_and_unmarked_ones_have_none():
    items = [
        Item("good", 0, "good", RGB),
        Item("bad", 1, "scar", RGB),
        Item("unknown", None, "unknown", RGB, np.ones(RGB.shape[:2], bool)),
        Item("marked", 1, "scar", RGB, np.ones(RGB.shape[:2], bool)),
    ]
    images = Images(items, 4)
    good, marked = images.mask(0), images.mask(3)
    assert good is not None
    assert good.dtype == bool
    assert good.shape == (4, 4)
    assert not good.any()
    assert images.mask(1) is None
    assert images.mask(2) is None
    assert marked is not None
    assert marked.all()


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
def test_a_size_that_is_no_positive_whole_number_is_refused(size):
    sentence = f"size must be a positive whole number of pixels, got {re.escape(repr(size))}"
    with pytest.raises(ValueError, match=sentence):
        Images([], size)
    with pytest.raises(ValueError, match=sentence):
        load_mask(MASK, size)
