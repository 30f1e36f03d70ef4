"""The gallery of a report: the order of the images, and what their pictures show."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext.reports import heat_maps, run_report

GRAY = np.full((24, 24, 3), 120, np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def decoded(source: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode((source or "").partition(",")[2])))


def test_the_pictures_are_image_heat_map_and_outline(tmp_path, a_run, page_of):
    mask = np.zeros((24, 24), bool)
    mask[6:12, 8:20] = True
    image, values, _ = a_run().pictures[0]
    page, _ = page_of(a_run(pictures=[(image, values, mask)] * 6), tmp_path)
    shown, line, heat = (decoded(a["src"]) for a in page.all("img")[:3])
    assert np.abs(pixels(shown) - image).max() < 4
    expected = pixels(heat_maps.heat_map(image, values, low=0.1, high=2.0))
    assert np.abs(pixels(heat) - expected).mean() < 8
    drawn = np.asarray(line.convert("RGBA"))
    assert (drawn[..., 3] == 255 * heat_maps.outline(mask)).all()
    assert (drawn[6, 8, :3] == (0, 229, 255)).all()


def test_the_outline_of_a_thin_defect_survives_a_small_picture(tmp_path, a_run, page_of):
    mask = np.zeros((1024, 1024), bool)
    mask[300, 100:900] = True
    large = (np.zeros((1024, 1024, 3), np.uint8), np.zeros((1024, 1024)), mask)
    page, _ = page_of(a_run(pictures=[large] * 6), tmp_path)
    line = np.asarray(decoded(page.all("img")[1]["src"]).convert("RGBA"))[..., 3]
    assert (line[75, 25:225] == 255).all()


def test_the_gallery_puts_the_worst_mistakes_first(tmp_path, a_run, page_of):
    page, html = page_of(a_run(), tmp_path)
    assert page.within("b") == ["good/1", "scar/0", "good/2", "blob/0", "good/0", "scar/1"]
    assert re.findall("(?:above|below) [a-z0-9]+ of [^<]*", html) == [
        *("above 1 of 3 defective", "below 1 of 3 good"),
        *("above none of 3 defective", "below none of 3 good"),
        *("above none of 3 defective", "below none of 3 good"),
    ]
    assert (
        len(
            [a for a in page.all("figure", **{"class": "card"}) if "mistake" in str(a["data-show"])]
        )
        == 2
    )


def test_unlabeled_images_come_last_the_highest_score_first(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(labels=[0, None, None, 1, 1, None]), tmp_path)
    assert page.within("b") == ["scar/0", "good/0", "scar/1", "blob/0", "good/1", "good/2"]


@pytest.fixture(scope="module")
def large_report(tmp_path_factory, a_run) -> tuple[Path, list[int]]:
    """A report on 2,100 noisy images, and the indices of the images that were read."""
    rng, asked = np.random.default_rng(0), []
    noise = rng.integers(0, 256, (128, 128, 3), np.uint8)
    mask = rng.random((128, 128)) < 0.5

    class OnDemand(Sequence):
        def __len__(self):
            return 2100

        def __getitem__(self, i):
            asked.append(i)
            return noise, mask.astype(np.float32), mask

    run = a_run(
        names=[f"n{i}" for i in range(2100)],
        defects=["good"] * 1000 + ["scar"] * 1100,
        labels=[0] * 1000 + [1] * 1100,
        scores=[float(i) for i in range(2100)],
        pictures=OnDemand(),
    )
    path = tmp_path_factory.mktemp("large") / "report.html"
    run_report.write_report(path, run)
    return path, asked


def test_a_large_report_shows_the_2000_worst_images_and_stays_small(large_report):
    path, asked = large_report
    html = path.read_text("utf-8")
    assert "2000 of 2100 test images are shown." in html
    assert len(asked) == len(set(asked)) == html.count('<figure class="card"') == 2000
    assert 0 not in asked
    assert path.stat().st_size < 30e6  # the worst case: noise with a mask of noise


def test_a_gallery_with_all_images_does_not_say_that_some_are_missing(tmp_path, a_run, page_of):
    _, html = page_of(a_run(), tmp_path)
    assert "are shown" not in html


def test_large_pictures_are_scaled_down(tmp_path, a_run, page_of):
    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 3), np.uint8)
    page, _ = page_of(a_run(pictures=[(noise, noise[..., 0], None)] * 6), tmp_path)
    assert {decoded(a["src"]).size for a in page.all("img")} == {(171, 256)}


def test_each_layer_has_a_button(tmp_path, a_run, page_of):
    image, values, _ = a_run().pictures[0]
    masked = (image, values, np.eye(24, dtype=bool))
    without, every = ["image", "heat"], ["image", "heat", "outline"]
    for pictures, expected in (
        (a_run().pictures, without),
        ([masked, *a_run().pictures[1:]], every),
    ):
        page, _ = page_of(a_run(pictures=pictures), tmp_path)
        assert [button["value"] for button in page.all("input", type="radio")] == expected
        assert all(picture["alt"] for picture in page.all("img"))
