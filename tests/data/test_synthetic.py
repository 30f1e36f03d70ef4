"""Seeded defects are visible, and change exactly the pixels of their masks."""

import functools

import numpy as np
import pytest

from msflow_ext.data import synthetic

PHOTO = np.random.default_rng(7).integers(60, 200, (96, 120), dtype=np.uint8)
FOREIGN = np.random.default_rng(8).integers(0, 256, PHOTO.shape, dtype=np.uint8)
DEFECTS = {
    "scar": synthetic.scar,
    "patch": synthetic.patch,
    "blur": synthetic.blur,
    "blob": synthetic.blob,
    "perlin": functools.partial(synthetic.perlin, foreign=FOREIGN),
}


@pytest.fixture(params=DEFECTS)
def defect(request):
    return DEFECTS[request.param]


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_exactly_the_changed_pixels(defect, seed):
    before = PHOTO.copy()
    changed, mask = defect(PHOTO, np.random.default_rng(seed))
    assert (changed.dtype, mask.dtype) == (np.uint8, bool)
    np.testing.assert_array_equal(changed != PHOTO, mask)
    np.testing.assert_array_equal(PHOTO, before)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_the_mask_is_exact_where_the_new_level_is_the_old_one(level):
    flat = np.full((64, 64), level, np.uint8)
    for make in (synthetic.scar, synthetic.blob):
        changed, mask = make(flat, np.random.default_rng(0))
        assert mask.any()
        np.testing.assert_array_equal(changed != flat, mask)


def test_a_drawn_defect_is_large_and_strong_enough_to_be_seen(defect):
    rng = np.random.default_rng(0)
    for _ in range(10):
        changed, mask = synthetic.draw(defect, PHOTO, rng)
        assert mask.sum() >= 30
        assert np.abs(changed.astype(int) - PHOTO)[mask].mean() >= 8


def test_the_seed_decides_the_defect(defect):
    first, again, other = (
        synthetic.draw(defect, PHOTO, np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


RECORDED = {  # pixels, their mean row and column, their mean level, over the seeds 0 to 4
    "scar": (367, 48.46, 63.62, 113.09),
    "patch": (816, 38.04, 60.49, 131.63),
    "blur": (1733, 48.66, 52.69, 129.97),
    "blob": (1051, 47.37, 65.27, 106.03),
    "perlin": (1275, 43.34, 58.34, 127.35),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_seed_draws_the_recorded_defect(kind):
    """Metrics on these images stay comparable between versions; three pixels may differ."""
    drawn = [DEFECTS[kind](PHOTO, np.random.default_rng(seed)) for seed in range(5)]
    changed, masks = (np.stack(each) for each in zip(*drawn, strict=True))
    pixels, row, column, level = RECORDED[kind]
    _, rows, columns = np.nonzero(masks)
    assert rows.size == pytest.approx(pixels, abs=3)
    assert (rows.mean(), columns.mean()) == pytest.approx((row, column), abs=0.2)
    assert changed[masks].mean() == pytest.approx(level, abs=0.3)


def test_faint_defects_are_drawn_again():
    sizes = iter([5, 6, 20])

    def square(image, rng):
        mask = np.zeros(image.shape, bool)
        side = next(sizes)
        mask[:side, :side] = True
        shift = 1 if side == 6 else 50  # too small, too faint, good
        return np.where(mask, image + np.uint8(shift), image), mask

    _, mask = synthetic.draw(square, PHOTO, np.random.default_rng(0))
    assert mask.sum() == 400


def test_blurring_a_flat_image_is_refused():
    flat = np.full((64, 64), 90, np.uint8)
    with pytest.raises(ValueError, match=r"no visible defect: the image \(64, 64\) is too small"):
        synthetic.draw(synthetic.blur, flat, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("pixels", "change", "drawn"), [(29, 50, 3), (30, 50, 1), (40, 7, 3), (40, 8, 1)]
)
def test_thirty_pixels_that_change_by_eight_levels_can_be_seen(pixels, change, drawn):
    calls = []

    def defect(image, rng):
        calls.append(1)
        mask = np.zeros(image.size, bool)
        mask[: pixels if len(calls) < 3 else 100] = True
        mask = mask.reshape(image.shape)
        return np.where(mask, image + np.uint8(change if len(calls) < 3 else 50), image), mask

    synthetic.draw(defect, PHOTO, np.random.default_rng(0))
    assert len(calls) == drawn


def test_a_blur_of_flat_pixels_is_not_marked():
    half = PHOTO.copy()
    half[:, :60] = 100
    masks = [synthetic.blur(half, np.random.default_rng(seed))[1] for seed in range(20)]
    assert np.any(masks, 0)[:, 64:].any()
    assert not np.any(masks, 0)[:, :56].any()


def test_a_pixel_that_would_keep_its_level_changes_by_one():
    image = np.array([[0, 127, 128, 255]], np.uint8)
    changed, _ = synthetic._change(image, np.ones((1, 4), bool), image)
    assert changed.tolist() == [[1, 128, 127, 254]]


def test_an_image_that_is_not_gray_uint8_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(TypeError, match="image must be uint8, got float64"):
        synthetic.draw(synthetic.scar, PHOTO / 255, rng)
    with pytest.raises(ValueError, match=r"image must have shape \(H, W\), got \(96, 120, 1\)"):
        synthetic.draw(synthetic.scar, PHOTO[..., None], rng)
