"""The packaged textures have fixed counts and exact masks, and share no pixel between train and test."""

import collections
import sys

import numpy as np
import pytest

from msflow_ext.data import Images, open_dataset
from msflow_ext.data.datasets import textures

data = pytest.importorskip("skimage.data")


def content(dataset):
    items = dataset.train + dataset.test
    return [np.asarray(x).tobytes() for i in items for x in (i.image, i.mask) if x is not None]


def test_a_set_has_the_documented_parts():
    brick = open_dataset("textures", category="brick")
    counts = collections.Counter(item.defect for item in brick.test)
    kinds = {"scar": 12, "patch": 12, "blur": 12, "blob": 12, "perlin": 12}
    assert counts == {"good": 40, **kinds}
    assert len(brick.train) == 96
    items = brick.train + brick.test
    assert {item.image.shape for item in items if isinstance(item.image, np.ndarray)} == {
        (192, 192)
    }
    assert len({item.name for item in items}) == 196
    assert {"train/good/003", "good/012", "scar/006"} < {item.name for item in items}
    assert {(item.label, item.defect) for item in brick.train} == {(0, "good")}
    assert {item.label for item in brick.test if item.defect == "good"} == {0}
    assert (brick.name, brick.category) == ("textures", "brick")


@pytest.mark.parametrize("category", textures.CATEGORIES)
def test_exactly_the_defects_are_marked(category):
    images = Images(textures.read(category, 3, train=1, good=2, defects=2).test, 192)
    for i, item in enumerate(images.items):
        mask = images.mask(i)
        assert mask is not None
        assert mask.any() == (item.label == 1) == (item.defect != "good")
        assert mask.mean() < 0.1


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not():
    first, again, other = (textures.read("grass", s, train=3, good=2, defects=2) for s in (5, 5, 6))
    assert content(first) == content(again)
    assert not set(content(first)) & set(content(other))


@pytest.mark.parametrize(
    ("category", "levels"),
    [
        ("brick", [104.37, 114.10, 116.91, 113.92, 111.66, 104.28, 113.19, 108.50, 107.57, 113.89]),
        ("grass", [124.90, 118.43, 112.10, 121.86, 113.65, 123.71, 125.96, 127.51, 115.01, 123.87]),
        (
            "gravel",
            [129.67, 120.32, 125.10, 121.97, 127.20, 129.65, 126.90, 129.36, 126.84, 126.50],
        ),
    ],
)
def test_a_seed_gives_crops_of_the_recorded_mean_levels(category, levels):
    """Metrics on these images stay comparable between versions."""
    dataset = textures.read(category, 0, train=3, good=2, defects=1)
    found = [np.asarray(item.image).mean() for item in dataset.train + dataset.test]
    assert found == pytest.approx(levels, abs=0.05)


def test_training_and_test_crops_share_no_row(monkeypatch):
    photo = np.full((512, 512), 128, np.uint8)
    photo[:304], photo[320:] = 60, 200
    monkeypatch.setattr(data, "gravel", lambda: photo)
    lit = textures.read("gravel", train=40, good=40, defects=0)
    train, test = (np.stack([np.asarray(i.image) for i in part]) for part in (lit.train, lit.test))
    assert 52 <= train.min() <= train.max() <= 68
    assert 192 <= test.min() <= test.max() <= 208


def test_crops_vary_in_brightness_and_mirroring(monkeypatch):
    ramp = np.tile(np.linspace(40, 200, 512).astype(np.uint8), (512, 1))
    monkeypatch.setattr(data, "brick", lambda: ramp)
    lit = textures.read("brick", train=30, defects=0)
    crops = [np.asarray(item.image).astype(float) for item in lit.train]
    slopes = np.array([(c[:, -1] - c[:, 0]).mean() for c in crops])
    assert (slopes > 0).any()
    assert (slopes < 0).any()
    assert np.abs(slopes).min() == pytest.approx(60 * 0.92, abs=2.5)
    assert np.abs(slopes).max() == pytest.approx(60 * 1.08, abs=2.5)


@pytest.mark.parametrize("category", [None, "coins"])
def test_an_unknown_category_lists_those_that_exist(category):
    with pytest.raises(ValueError, match=rf"one of brick, grass, gravel, got {category!r}"):
        open_dataset("textures", category=category)


def test_a_crop_of_one_pixel_is_the_smallest():
    (item,) = textures.read("brick", size=1, train=1, good=0, defects=0).train
    assert np.asarray(item.image).shape == (1, 1)


@pytest.mark.parametrize("size", [0, 193])
def test_a_crop_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=rf"size must be in 1\.\.192, got {size}"):
        textures.read("brick", size=size)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-image: pip install msflow-ext\[demo\]"):
        open_dataset("textures", category="brick")
