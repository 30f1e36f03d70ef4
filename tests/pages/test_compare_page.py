"""In a browser, a comparison opens without an error in light, dark and narrow windows and in print."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msflow_ext.reports import comparison, heat_maps
from msflow_ext.runs.results import read_runs
from msflow_ext.runs.score_table import Row, write_scores


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the comparison of three runs on 60 images, on most of which they disagree."""
    root, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    names = [f"n{i}" for i in range(60)]
    labels = [int(i >= 30) for i in range(60)]
    for name in ("narrow", "a-run-of-a-longer-name", "third"):
        rows = zip(names, ["good"] * 30 + ["scar"] * 30, labels, rng.random(60), strict=True)
        write_scores(root / name / "scores.csv", [Row(*row) for row in rows])
        facts = {part: {"name": name} for part in ("model", "recipe", "data", "versions")}
        facts["data"]["category"] = "white"
        value = {"image_auroc": rng.random(), "pixel_auroc": rng.random()}
        content = json.dumps({**value, "best": value, **facts})
        (root / name / "metrics.json").write_text(content)
        image, maps = np.full((32, 32, 3), 90, np.uint8), rng.random((60, 32, 32))
        heat_maps.save_maps(root / name, names, [image] * 60, maps, [None] * 60, low=0, high=1)
    runs = read_runs(sorted(path for path in root.iterdir()))
    comparison.write_comparison(root / "page.html", runs)
    return root / "page.html"


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (360, False)], ids=["light", "dark", "narrow"]
)
def test_the_page_opens_without_errors_or_horizontal_scrolling(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") == width
    drawn = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L")).astype(int)
    assert (np.median(drawn) < 40) == dark
    assert np.ptp(drawn) > 180


def test_the_page_shows_a_curve_for_each_run_and_a_dot_for_each_image(browser, page):
    browser.open(page)
    colors = "new Set([...document.querySelectorAll('polyline[class^=run-]')].map(p => getComputedStyle(p).stroke)).size"
    assert browser.run(colors) == 3
    assert browser.run("document.querySelectorAll('circle').length") == 2 * 60
    sizes = "[...document.images].map(i => i.decode().then(() => i.naturalWidth))"
    assert browser.run(f"Promise.all({sizes})") == [32] * 24 * 4
    assert browser.pdf().startswith(b"%PDF")
