"""Heat maps keep the order of map values, and their files stay inside their folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext.reports import heat_maps

GRAY = np.full((24, 24, 3), 120, np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def save(folder: Path, *names: str, mask: np.ndarray | None = None) -> list[Path]:
    n = len(names)
    maps = [np.zeros((24, 24))] * n
    return heat_maps.save_maps(folder, names, [GRAY] * n, maps, [mask] * n, low=0, high=1)


def test_lightness_increases_with_the_value_over_the_whole_ramp():
    values = np.linspace(-1.0, 2.0, 300)[None].repeat(2, 0)
    picture = heat_maps.heat_map(
        np.zeros((2, 300, 3), np.uint8), values, low=0.0, high=1.0, alpha=1.0
    )
    row = pixels(picture)[0]
    lightness = row @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness[100:200]) >= -0.5).all()  # a rounded channel may step back by one
    assert lightness[199] - lightness[100] > 200
    assert (row[:100] == row[0]).all()
    assert (row[200:] == row[-1]).all()


def test_alpha_0_shows_the_image_and_higher_values_are_more_opaque():
    image = np.zeros((1, 50, 3), np.uint8)
    values = np.linspace(0.0, 1.0, 50)[None]
    none, half, full = (
        pixels(heat_maps.heat_map(image, values, low=0, high=1, alpha=a)) for a in (0, 0.5, 1)
    )
    assert (none == image).all()
    cover = half[0].max(-1) / full[0].max(-1)
    assert (np.diff(cover) > -0.03).all()  # colors are rounded
    assert cover[0] < 0.4 < 0.95 < cover[-1]


@pytest.mark.family("pages")
def test_the_highest_value_has_a_warmer_color_than_the_lowest_on_any_image():
    corners = np.stack(np.meshgrid(*[[0, 255]] * 3), -1).reshape(1, -1, 3).astype(np.uint8)

    def warmth(value: float) -> np.ndarray:
        shown = pixels(heat_maps.heat_map(corners, np.full((1, 8), value), low=0, high=1))
        return shown[..., 0] - shown[..., 2]

    assert warmth(1.0).min() > warmth(0.0).max()


def test_the_outline_is_the_edge_of_the_mask_only():
    mask = np.zeros((24, 24), bool)
    mask[5:10, 6:12] = True
    changed = (pixels(heat_maps.mask_contour(GRAY, mask)) != GRAY).any(-1)
    edge = mask.copy()
    edge[6:9, 7:11] = False
    assert (changed == edge).all()


def test_a_mask_is_outlined_on_top_of_the_heat_map():
    mask = np.eye(24, dtype=bool)
    plain = pixels(heat_maps.heat_map(GRAY, np.zeros((24, 24)), low=0, high=1))
    marked = pixels(heat_maps.heat_map(GRAY, np.zeros((24, 24)), low=0, high=1, mask=mask))
    assert ((marked != plain).any(-1) == mask).all()


def test_a_mask_that_covers_the_whole_image_still_shows_an_outline():
    drawn = pixels(heat_maps.mask_contour(GRAY, np.ones((24, 24), bool)))
    assert (drawn[0] != GRAY[0]).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": GRAY.astype(float)}, TypeError, "image must be uint8, got float64"),
        ({"image": GRAY[..., 0]}, ValueError, r"image must have shape \(H, W, 3\), got \(24, 24\)"),
        (
            {"anomaly_map": np.zeros((24, 23))},
            ValueError,
            r"anomaly_map must have shape \(24, 24\), got",
        ),
        (
            {"anomaly_map": np.full((24, 24), np.nan)},
            ValueError,
            "anomaly_map must be finite, got NaN",
        ),
        ({"low": 1.0}, ValueError, "low < high, got 1.0 and 1.0"),
        ({"high": np.inf}, ValueError, "low < high, got 0.0 and inf"),
        ({"alpha": 1.5}, ValueError, "alpha must be in 0..1, got 1.5"),
        ({"mask": np.ones((3, 3), bool)}, ValueError, r"mask must have shape \(24, 24\), got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused_by_name(change, error, message):
    good = {"image": GRAY, "anomaly_map": np.zeros((24, 24)), "low": 0.0, "high": 1.0}
    with pytest.raises(error, match=message):
        heat_maps.heat_map(**{**good, **change})


def test_a_few_extreme_pixels_do_not_stretch_the_range():
    maps = np.random.default_rng(0).random((4, 100, 100))
    maps[0, 0, :3] = 1e6
    low, high = heat_maps.colour_range(maps)
    assert 0.4 < low < 0.6
    assert 0.9 < high <= 1.0


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e20], ids=str)
def test_constant_maps_have_the_lowest_color_of_a_valid_range(value):
    maps = np.full((2, 24, 24), value, np.float32)
    low, high = heat_maps.colour_range(maps)
    assert low == maps[0, 0, 0]
    assert high > low
    picture = heat_maps.heat_map(GRAY, maps[0], low=low, high=high, alpha=1.0)
    assert set(np.unique(np.asarray(picture))) == {8, 32}


def test_a_single_pixel_that_differs_is_visible():
    maps = np.zeros((1, 64, 64))
    maps[0, 3, 3] = 5.0
    assert heat_maps.colour_range(maps) == (0.0, 5.0)


def test_the_color_range_scales_with_the_maps():
    maps = np.random.default_rng(0).random((2, 32, 32))
    low, high = heat_maps.colour_range(maps)
    assert heat_maps.colour_range(1e-30 * maps) == pytest.approx((1e-30 * low, 1e-30 * high))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_values_that_are_not_finite_are_refused(bad):
    maps = np.zeros((3, 200, 200))
    maps[1, 1, 1] = bad
    with pytest.raises(ValueError, match="maps must be finite, got NaN or infinity in map 1"):
        heat_maps.colour_range(maps)


def test_an_empty_list_of_maps_is_refused():
    with pytest.raises(ValueError, match="must have at least one pixel"):
        heat_maps.colour_range([])


def test_names_with_folders_become_flat_files(tmp_path):
    paths = save(tmp_path, "scar/006", "good/006")
    assert paths == [tmp_path / "maps" / "scar-006.png", tmp_path / "maps" / "good-006.png"]
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == [
        "good-006.png",
        "scar-006.png",
    ]


def test_the_panels_are_image_heat_map_and_mask_outline_if_there_is_a_mask(tmp_path):
    mask = np.zeros((24, 24), bool)
    mask[4:12, 4:12] = True
    with_mask, without = (pixels(Image.open(save(tmp_path, "a", mask=m)[0])) for m in (mask, None))
    assert with_mask.shape == (24, 3 * 24 + 2 * 2, 3)
    assert without.shape == (24, 2 * 24 + 2, 3)
    heat = heat_maps.heat_map(GRAY, np.zeros((24, 24)), low=0, high=1)
    assert (with_mask[:, :24] == GRAY).all()
    assert (with_mask[:, 26:50] == pixels(heat)).all()
    assert (with_mask[:, 52:] == pixels(heat_maps.mask_contour(GRAY, mask))).all()


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "..", "", "a\\..\\b", "x" * 400, "\udcff/\n", "é/" * 150]
)
def test_no_name_points_outside_the_folder(tmp_path, name):
    (path,) = save(tmp_path / "run", name)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert list((tmp_path / "run" / "maps").iterdir()) == [path]
    assert not path.name.startswith((".", "-"))


def test_names_that_flatten_to_the_same_file_name_get_separate_files(tmp_path):
    paths = save(tmp_path, "a/b", "a-b", "A-b", "a-b-2")
    assert len({p.name.casefold() for p in paths}) == 4
    assert all(p.exists() for p in paths)


def test_lists_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        heat_maps.save_maps(
            tmp_path, ["a", "b"], [GRAY, GRAY], [np.zeros((24, 24))], [None] * 2, low=0, high=1
        )
