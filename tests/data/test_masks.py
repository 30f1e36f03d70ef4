"""Masks of all common encodings mark the same pixels, and invalid masks are refused."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from msflow_ext.data import Images, Item, decoding, load_mask
from msflow_ext.data.masks import decode_mask, read_mask, resize

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
MASK = np.zeros((8, 8), dtype=bool)
MASK[2:4, 2:6] = True


def palette_mask(indices, colors):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colors)
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
        Image.merge(
            "CMYK", [Image.new("L", (8, 8))] * 3 + [Image.fromarray(~MASK * np.uint8(255))]
        ),
    ],
    ids=["CMYK"],
)
def test_a_mask_of_a_mode_that_only_tiff_has_marks_the_same_pixels(tmp_path, mask):
    mask.save(tmp_path / "m.tif")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.tif", 8), MASK)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_a_mask_array_is_resized_to_the_nearest_pixel(dtype):
    doubled = MASK.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(load_mask(MASK.astype(dtype), 16), doubled)
    np.testing.assert_array_equal(load_mask(doubled.astype(dtype), 8), MASK)


def test_a_mask_array_of_another_shape_or_dtype_is_refused():
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
    sentence = (
        r"mask .*mask\.png must have the size of its image .*image\.png, 9x6 pixels, got 8x8$"
    )
    with pytest.raises(ValueError, match=sentence):
        Images([item], 8).mask(0)


def turned_by(path, orientation, image):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif)
    return path


@pytest.mark.family("masks")
def test_a_mask_must_be_rotated_by_exif_as_its_image_is(tmp_path):
    image = turned_by(tmp_path / "i.png", 6, RGB)
    on_screen = np.zeros((9, 6), bool)
    on_screen[:2, :3] = True
    np.testing.assert_array_equal(read_mask(on_screen, image), on_screen)
    stored = np.rot90(on_screen)  # as the file stores it
    mask = turned_by(tmp_path / "m.png", 6, stored * np.uint8(255))
    np.testing.assert_array_equal(read_mask(mask, image), on_screen)
    with pytest.raises(ValueError, match=r"i\.png, 6x9 pixels \(rotated by EXIF\), got 9x6$"):
        read_mask(stored, image)


def test_a_mask_folder_is_the_union_of_its_files(tmp_path):
    left, right = MASK.copy(), MASK.copy()
    left[:, 4:], right[:, :4] = False, False
    for i, part in enumerate((left, right)):
        Image.fromarray(part * np.uint8(90 + i)).save(tmp_path / f"00{i}.png")
    (tmp_path / "notes.txt").write_text("no mask")
    np.testing.assert_array_equal(load_mask(tmp_path, 8), MASK)


def test_a_mask_folder_without_files_of_one_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder of images of one size, got 0 images"):
        load_mask(tmp_path, 8)
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    Image.new("L", (8, 9)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"must be a folder of images of one size, got 2 images"):
        load_mask(tmp_path, 8)


def drawn(scale):
    """Draw two shapes, one of them thin, at 8 times ``64 * scale`` pixels, to be scaled down."""
    image = Image.new("L", (512 * scale, 512 * scale))
    draw = ImageDraw.Draw(image)
    draw.ellipse([x * scale for x in (80, 60, 250, 300)], fill=255)
    draw.polygon([x * scale for x in (300, 330, 480, 340, 400, 470)], fill=255)
    return image


SOFT = {
    "smoothed": lambda sharp: drawn(1).resize((64, 64), Image.Resampling.BOX),
    "resampled": lambda sharp: drawn(1).resize((64, 64), Image.Resampling.LANCZOS),
    "blurred": lambda sharp: sharp.filter(ImageFilter.GaussianBlur(1.5)),
    "16-bit": lambda sharp: Image.fromarray(
        np.asarray(sharp.filter(ImageFilter.GaussianBlur(1))).astype(np.uint16) * 257
    ),
    "RGB": lambda sharp: Image.merge(
        "RGB", [sharp.filter(ImageFilter.GaussianBlur(1)), *[Image.new("L", (64, 64))] * 2]
    ),
}


@pytest.mark.family("masks")
@pytest.mark.parametrize("kind", SOFT)
def test_a_mask_with_soft_outlines_is_cut_at_half(tmp_path, kind):
    sharp = drawn(1).resize((64, 64), Image.Resampling.BOX).point([0] * 128 + [255] * 128)
    soft = SOFT[kind](sharp)
    soft.save(tmp_path / "m.png")
    mask = decode_mask(tmp_path / "m.png")
    levels = np.asarray(soft).reshape(64, 64, -1).max(axis=2)
    assert mask.soft
    np.testing.assert_array_equal(mask.marks, levels > levels.max() / 2)
    assert (mask.marks != np.asarray(sharp).astype(bool)).sum() < 25  # of 900


@pytest.mark.family("masks")
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("quality", [50, 75, 90])
def test_compression_artifacts_are_not_marked(tmp_path, suffix, quality):
    sharp = drawn(2).resize((128, 128), Image.Resampling.NEAREST)
    sharp.save(tmp_path / f"m.{suffix}", quality=quality)
    mask = decode_mask(tmp_path / f"m.{suffix}")
    np.testing.assert_array_equal(decoding.read_mask(tmp_path / f"m.{suffix}"), mask.marks)
    assert mask.soft
    assert ndimage.label(mask.marks, np.ones((3, 3)))[1] == 2  # pyright: ignore[reportIndexIssue]
    assert (mask.marks != np.asarray(sharp).astype(bool)).mean() < 0.002


@pytest.mark.family("masks")
def test_a_jpeg_saved_as_png_is_cut_too(tmp_path):
    sharp = drawn(2).resize((128, 128), Image.Resampling.NEAREST)
    sharp.save(tmp_path / "m.jpg", quality=75)
    Image.open(tmp_path / "m.jpg").save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), read_mask(tmp_path / "m.jpg"))


@pytest.mark.family("masks")
def test_a_faint_region_of_a_soft_mask_is_not_lost(tmp_path):
    levels = np.zeros((40, 40), np.uint8)
    levels[4:16, 4:16] = 255
    levels[3, 4:16] = 120  # a soft outline
    levels[30, 5:35] = 110  # a line between two rows of pixels
    Image.fromarray(levels).save(tmp_path / "m.png")
    expected = levels == 255
    expected[30, 5:35] = True
    mask = decode_mask(tmp_path / "m.png")
    assert mask.soft
    np.testing.assert_array_equal(mask.marks, expected)


CLASSES = {
    "numbers": (1, 2, 3),
    "spread": (85, 170, 255),
    "one of them": (10, 255),
    "void": (1, 2, 255),
    "16 bits": (20000, 65535),
}


@pytest.mark.family("masks")
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_a_mask_is_marked(tmp_path, kind):
    levels = np.zeros((30, 40), np.uint16)
    for i, level in enumerate(CLASSES[kind]):
        levels[3 + 9 * i : 10 + 9 * i, 5:30] = level
    levels[3:30, 34] = CLASSES[kind][0]  # a thin region
    image = levels.astype(np.uint8) if levels.max() < 256 else levels
    Image.fromarray(image).save(tmp_path / "m.png")
    mask = decode_mask(tmp_path / "m.png")
    assert not mask.soft
    np.testing.assert_array_equal(mask.marks, levels > 0)


@pytest.mark.family("masks")
def test_a_palette_of_many_colors_holds_classes(tmp_path):
    indices = np.zeros((20, 20), np.uint8)
    indices[2:18:2, 2:18] = np.arange(1, 17)
    colors = [0, 0, 0] + [8 * i for i in range(1, 17) for _ in range(3)]
    palette_mask(indices, colors).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), indices > 0)


ALPHA = {  # colors inside and outside the shape
    "white": ((255, 255, 255), (255, 255, 255)),
    "black": ((0, 0, 0), (0, 0, 0)),
    "red on white": ((255, 0, 0), (255, 255, 255)),
}


@pytest.mark.family("masks")
@pytest.mark.parametrize("colors", ALPHA)
def test_the_alpha_channel_is_the_mask_if_the_colors_are_flat(tmp_path, colors):
    inside, outside = ALPHA[colors]
    rgb = np.where(MASK[..., None], inside, outside).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, MASK * np.uint8(255)])).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), MASK)


@pytest.mark.family("masks")
def test_alpha_is_ignored_if_the_colors_hold_a_shape_or_it_is_flat(tmp_path):
    other = np.zeros((8, 8), np.uint8)
    other[5:] = 200
    for alpha in (other, other[::-1]):
        gray = np.dstack([MASK * np.uint8(255), alpha])
        Image.fromarray(gray).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), MASK)
    full = np.full((8, 8, 2), 255, np.uint8)
    Image.fromarray(full).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").all()


@pytest.mark.family("masks")
def test_a_region_between_the_nearest_pixels_keeps_its_place():
    scratch = np.zeros((1024, 1024), bool)
    scratch[200:800, 401:410] = True  # between two of 96 columns
    blob = np.zeros((1024, 1024), bool)
    blob[600:700, 600:700] = True
    for marks, lost in ((scratch, 1), (blob, 0), (scratch | blob, 1)):
        small, count = resize(marks, 96, 96)
        assert count == lost
        nearest = marks[5::32, 5::32]
        assert small.shape == (96, 96)
        assert small.any() and nearest.shape == (32, 32)
    small = load_mask(scratch, 96)
    rows, columns = np.nonzero(small)
    assert set(columns) <= {37, 38} and set(range(19, 75)) <= set(rows)
    np.testing.assert_array_equal(load_mask(scratch | blob, 96), small | load_mask(blob, 96))


@pytest.mark.family("masks")
@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("shape", [(50, 50), (31, 97), (160, 40), (7, 9)])
def test_every_region_keeps_a_pixel_and_the_others_are_the_nearest(shape, fit):
    rng = np.random.default_rng(shape[0])
    for density in (0.002, 0.02, 0.2):
        marks = rng.random(shape) < density
        image = Images([Item("a", 1, "scar", np.zeros(shape, np.uint8), marks)], 16, fit)
        mask, box = image.mask(0), image.box(0)
        assert mask is not None
        small, shown = mask[box], tuple(part.stop - part.start for part in box)
        assert mask.sum() == small.sum()
        nearest = Image.fromarray(marks).resize(shown[::-1], Image.Resampling.NEAREST)
        assert (small >= np.asarray(nearest)).all()
        numbered, count = ndimage.label(marks, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        for region in range(1, count + 1):
            rows, columns = np.nonzero(numbered == region)
            places = [
                (at * new // old)
                for at, new, old in zip((rows, columns), shown, shape, strict=True)
            ]
            hit = np.asarray(Image.fromarray(numbered == region).resize(shown[::-1], 0)).any()
            assert hit or small[tuple(places)].all()


@pytest.mark.family("masks")
def test_a_mask_of_floats_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a mask array must be bool or integer, got float32"):
        read_mask(MASK.astype(np.float32))
    Image.fromarray(MASK.astype(np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=r"m\.tif cannot be read: TIFF with 1 x float32"):
        read_mask(tmp_path / "m.tif")
