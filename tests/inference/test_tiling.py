"""Tiles cover their image, and the joined maps equal the map that they were cut from."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from msflow_ext.inference import tiling

SIZES = {
    "one-tile": (16, 16, 16, 4),
    "one-pixel-more": (16, 17, 16, 0),
    "multiples": (32, 48, 16, 0),
    "no-multiples": (37, 53, 16, 4),
    "one-pixel-overlap": (31, 46, 16, 1),
    "most-overlap": (20, 23, 16, 15),
    "odd-side": (40, 29, 7, 3),
    "one-pixel-tiles": (3, 2, 1, 0),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_tiles_cover_the_image_with_the_given_overlap(sizes):
    height, width, side, overlap = sizes
    covered = np.zeros((height, width), int)
    boxes = tiling.grid(*sizes)
    for box in boxes:
        assert covered[box].shape == (side, side)
        covered[box] += 1
    assert covered.min() == 1
    for axis, length in ((0, height), (1, width)):
        starts = sorted({box[axis].start for box in boxes})
        assert starts[0] == 0
        assert starts[-1] + side == length
        assert all(0 < b - a <= side - overlap for a, b in pairwise(starts))
        least = -(-(length - side) // (side - overlap)) + 1
        assert len(starts) == least


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equal_maps_are_joined_without_rounding(sizes):
    height, width = sizes[:2]
    for whole in (
        np.random.default_rng(0).normal(size=(height, width)).astype(np.float32),
        np.full((height, width), 0.1, np.float32),
    ):
        tiles = ((box, whole[box]) for box in tiling.grid(*sizes))
        assert np.array_equal(tiling.stitch(tiles, height, width), whole)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_different_maps_are_averaged_with_weights_that_sum_to_one(sizes):
    height, width, side, _ = sizes
    boxes = tiling.grid(*sizes)
    maps = np.random.default_rng(0).normal(size=(len(boxes), side, side))
    near = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0
    total, sums = np.zeros((height, width)), np.zeros((height, width))
    for box, each in zip(boxes, maps, strict=True):
        total[box] += np.outer(near, near)
        sums[box] += np.outer(near, near) * each
    joined = tiling.stitch(zip(boxes, maps.astype(np.float32), strict=True), height, width)
    np.testing.assert_allclose(joined, sums / total, rtol=1e-5, atol=1e-5)


def test_a_step_between_two_tiles_becomes_a_linear_ramp():
    boxes = tiling.grid(8, 13, 8, 3)
    joined = tiling.stitch(((b, np.full((8, 8), b[1].start / 5)) for b in boxes), 8, 13)
    np.testing.assert_allclose(joined, np.tile([0] * 5 + [0.25, 0.5, 0.75] + [1] * 5, (8, 1)))


def test_an_image_smaller_than_a_tile_is_centered_on_black():
    image = torch.full((3, 5, 30), 7, dtype=torch.uint8)
    whole, box = tiling.padded(image, 16)
    assert whole.shape == (3, 16, 30)
    assert torch.equal(whole[:, box[0], box[1]], image)
    assert whole.sum() == image.sum()
    assert box == (slice(5, 10), slice(0, 30))
    narrow, box = tiling.padded(image.mT, 16)
    assert torch.equal(narrow, whole.mT)
    assert box == (slice(0, 30), slice(5, 10))
    large = torch.ones(3, 16, 17)
    assert torch.equal(tiling.padded(large, 16)[0], large)


def test_a_tile_is_float_in_0_to_1():
    levels = torch.arange(48, dtype=torch.uint8).view(3, 4, 4) * 5
    box = slice(1, 3), slice(0, 2)
    tile = tiling.cut(levels, box)
    assert tile.dtype == torch.float32
    assert torch.equal(tile, levels[:, 1:3, 0:2] / 255)
    assert torch.equal(tiling.cut(levels.double() / 255, box), tile)


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_an_overlap_out_of_range_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap must be .* below 16 pixels, got {overlap}"):
        tiling.grid(32, 32, 16, overlap)


def test_an_overlap_in_pixels_is_a_share_of_the_side_rounded_down():
    shares = [(0.0, 64), (0.25, 64), (0.1, 64), (0.99, 16)]
    assert [tiling.pixels_of(*share) for share in shares] == [0, 16, 6, 15]


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 2, float("nan")])
def test_a_share_outside_0_to_1_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap must be .* below 1, got {overlap}"):
        tiling.pixels_of(overlap, 16)


def test_a_tile_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="side must be 1 to 15 pixels, got 16"):
        tiling.grid(15, 40, 16, 0)
