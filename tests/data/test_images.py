"""Images and masks become the square tensors that models see."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext.data import Images, Item, load_mask
from msflow_ext.data.images import resized

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
MASK = np.zeros((8, 8), dtype=bool)
MASK[2:4, 2:6] = True


def test_images_are_float_rgb_in_0_to_1_of_the_requested_size():
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


def test_resizing_uses_lanczos():
    resized = Image.fromarray(RGB).resize((4, 4), Image.Resampling.LANCZOS)
    ours = Images([Item("a", 0, "good", RGB)], 4)[0].permute(1, 2, 0) * 255
    np.testing.assert_array_equal(ours.round().numpy(), np.asarray(resized))


def test_good_items_have_empty_masks_and_unmarked_items_have_none():
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


def test_one_pixel_is_the_smallest_size():
    assert Images([Item("a", 0, "good", RGB)], 1)[0].shape == (3, 1, 1)
    assert load_mask(MASK, 1).shape == (1, 1)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
def test_a_size_that_is_not_a_positive_integer_is_refused(size):
    sentence = f"size must be a positive whole number of pixels, got {re.escape(repr(size))}"
    with pytest.raises(ValueError, match=sentence):
        Images([], size)
    with pytest.raises(ValueError, match=sentence):
        load_mask(MASK, size)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (1, 40), (5, 8), (8, 8)])
def test_padding_keeps_the_aspect_and_centres_image_and_mask_alike(shape):
    white = Item("a", 1, "scar", np.full(shape, 255, np.uint8), np.ones(shape, bool))
    images = Images([white], 16, fit="pad")
    height, width = (max(1, round(16 * side / max(shape))) for side in shape)
    top, left = (16 - height) // 2, (16 - width) // 2
    expected = np.zeros((16, 16), bool)
    expected[top : top + height, left : left + width] = True
    np.testing.assert_array_equal(images[0].numpy() == 1, np.stack([expected] * 3))
    np.testing.assert_array_equal(images[0].numpy() == 0, ~np.stack([expected] * 3))
    np.testing.assert_array_equal(images.mask(0), expected)


def test_a_padded_defect_stays_on_its_pixels():
    image, mask = np.full((20, 40), 60, np.uint8), np.zeros((20, 40), bool)
    mask[5:10, 30:38] = True
    image[mask] = 250
    images = Images([Item("a", 1, "scar", image, mask)], 40, fit="pad")
    np.testing.assert_array_equal(images[0][0].numpy() * 255 > 200, images.mask(0))


def test_resizing_is_the_default_and_an_unknown_fit_is_refused():
    item = Item("a", 0, "good", RGB)
    assert torch.equal(Images([item], 6)[0], Images([item], 6, fit="resize")[0])
    assert not torch.equal(Images([item], 6)[0], Images([item], 6, fit="pad")[0])
    with pytest.raises(ValueError, match="fit must be one of resize, pad, got 'crop'"):
        Images([item], 6, fit="crop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="fit must be one of resize, pad, got 'crop'"):
        load_mask(MASK, 6, fit="crop")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("shape", "box"), [((4, 8), (2, 6, 0, 8)), ((9, 3), (0, 8, 2, 5))])
def test_the_box_of_a_padded_image_holds_the_image_and_nothing_else(shape, box):
    top, bottom, left, right = box
    images = Images([Item("a", 0, "good", np.full(shape, 255, np.uint8))], 8, "pad")
    assert images.box(0) == (slice(top, bottom), slice(left, right))
    seen = images[0][0].numpy() > 0
    assert seen[images.box(0)].all()
    assert seen.sum() == (bottom - top) * (right - left)
    assert Images(images.items, 8).box(0) == (slice(0, 8), slice(0, 8))


@pytest.mark.family("pages")
@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 30), (1, 90), (20, 20)])
def test_shown_keeps_the_aspect_ratio_of_image_and_mask(height, width, fit):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = 200
    marked = image[..., 0] > 0
    images = Images([Item("a", 1, "scar", image, marked), Item("b", 0, "good", image)], 20, fit)
    picture, mask = images.shown(0)
    assert max(picture.shape[:2]) == 20
    assert picture.shape[0] / picture.shape[1] == pytest.approx(height / width, abs=0.05)
    assert mask is not None
    assert mask.shape == picture.shape[:2]
    assert mask[:, 0].all() and not mask[:, -1].any()
    assert np.abs(picture[mask][:, 0].astype(int) - 200).max() < 40
    (_, empty) = images.shown(1)
    assert empty is not None and not empty.any()


def test_images_maps_and_masks_are_resized_to_a_height_and_width():
    rng = np.random.default_rng(0)
    for values in (
        rng.integers(0, 256, (6, 9, 3), np.uint8),
        rng.random((6, 9)).astype(np.float32),
        rng.random((6, 9)) > 0.5,
    ):
        found = resized(values, 4, 12)
        assert found.dtype == values.dtype
        assert found.shape == (4, 12, *values.shape[2:])
        assert np.array_equal(resized(values, 6, 9), values)
