"""A report is one whole, well-formed file that needs no network and runs no text."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msflow_ext.evaluation.calibration import rates
from msflow_ext.metrics import auroc
from msflow_ext.reports import heat_maps, run_report
from msflow_ext.runs.score_table import Row, write_scores

GRAY = np.full((24, 24, 3), 120, np.uint8)
HOSTILE = '<script>alert("x")</script> & \'"><img src=x onerror=alert(1)>'
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Reads a report: every tag must close, in order; texts are kept by the tag they are in."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]

    def within(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]


def a_run(**changes: Any) -> run_report.ReportedRun:
    """Three good and three defective images of two kinds, with one mistake each way."""
    picture = (GRAY, np.linspace(0.0, 2.0, 24 * 24).reshape(24, 24), None)
    run = run_report.ReportedRun(
        title="brick",
        metrics={"image_auroc": 0.98765, "pixel_auroc": 0.5, "aupro": None},
        best={"image_auroc": 0.99, "pixel_auroc": 0.6, "aupro": None},
        epochs=3,
        seconds=125.0,
        names=["good/0", "good/1", "good/2", "scar/0", "scar/1", "blob/0"],
        defects=["good", "good", "good", "scar", "scar", "blob"],
        labels=[0, 0, 0, 1, 1, 1],
        scores=[0.1, 0.6, 0.2, 0.5, 0.9, 0.8],
        losses=[1.0, 0.5, 0.25],
        pictures=[picture] * 6,
        colours=(0.1, 2.0),
        facts={
            "recipe": {"blocks": (2, 5, 8), "bf16": False, "padding_mode": None, "lr": 1e-4},
            "versions": {"torch": "2.15.0"},
        },
    )
    return dataclasses.replace(run, **changes)


def first(run: run_report.ReportedRun, count: int) -> run_report.ReportedRun:
    parts = ("names", "defects", "labels", "scores", "pictures")
    return dataclasses.replace(run, **{name: getattr(run, name)[:count] for name in parts})


def page_of(run: run_report.ReportedRun, folder: Path) -> tuple[Page, str]:
    run_report.write_report(folder / "report.html", run)
    html = (folder / "report.html").read_text("utf-8")
    return Page(html), html


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("what", ["scores.csv", "report.html", "maps/a.png"])
def test_a_disk_that_fails_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, what
):
    def write(value: float) -> None:
        write_scores(tmp_path / "scores.csv", [Row("a", "good", 0, value)])
        run_report.write_report(tmp_path / "report.html", a_run(seconds=value))
        flat = np.full((24, 24), value)
        heat_maps.save_maps(tmp_path, ["a"], [GRAY], [flat], [None], low=0, high=99)

    def fail(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / what:
            raise OSError("No space left on device")
        os.rename(source, target)

    write(1.0)
    before, files = (tmp_path / what).read_bytes(), sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(50.0)
    assert (tmp_path / what).read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == files


def test_it_is_well_formed_and_asks_nothing_of_the_network(tmp_path):
    page, html = page_of(a_run(), tmp_path)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]+", "", html))
    sources = [a["src"] or "" for t, a in page.tags if "src" in a]
    assert len(sources) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not page.all("link")
    assert not [a for _, a in page.tags if "href" in a]


def decoded(source: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode((source or "").partition(",")[2])))


def test_its_pictures_are_the_image_the_heat_map_and_the_outline(tmp_path):
    mask = np.zeros((24, 24), bool)
    mask[6:12, 8:20] = True
    image, values, _ = a_run().pictures[0]
    page, _ = page_of(a_run(pictures=[(image, values, mask)] * 6), tmp_path)
    shown, line, heat = (decoded(a["src"]) for a in page.all("img")[:3])
    assert np.abs(pixels(shown) - image).max() < 4
    wanted = pixels(heat_maps.heat_map(image, values, low=0.1, high=2.0))
    assert np.abs(pixels(heat) - wanted).mean() < 8
    drawn = np.asarray(line.convert("RGBA"))
    assert (drawn[..., 3] == 255 * heat_maps.outline(mask)).all()
    assert (drawn[6, 8, :3] == (0, 229, 255)).all()


def test_the_outline_of_a_thin_defect_survives_a_small_picture(tmp_path):
    mask = np.zeros((1024, 1024), bool)
    mask[300, 100:900] = True
    large = (np.zeros((1024, 1024, 3), np.uint8), np.zeros((1024, 1024)), mask)
    page, _ = page_of(a_run(pictures=[large] * 6), tmp_path)
    line = np.asarray(decoded(page.all("img")[1]["src"]).convert("RGBA"))[..., 3]
    assert (line[75, 25:225] == 255).all()


@pytest.mark.parametrize("field", ["title", "names", "defects", "facts", "metrics"])
def test_hostile_text_is_shown_and_never_run(tmp_path, field):
    harmless, _ = page_of(a_run(), tmp_path)
    texts = {
        "title": HOSTILE,
        "names": [HOSTILE] * 6,
        "defects": [HOSTILE] * 6,
        "facts": {HOSTILE: {HOSTILE: [HOSTILE], "b": {"c": 1}}},
        "metrics": {HOSTILE: 0.5, "b": 1, "c": 1},
    }
    page, html = page_of(a_run(**{field: texts[field]}), tmp_path)
    assert HOSTILE not in html
    assert HOSTILE.casefold() in " ".join(text for _, text in page.texts).casefold()
    assert len(page.all("script")) == len(harmless.all("script")) == 1
    assert len(page.all("img")) == len(harmless.all("img"))
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_metrics_are_percent_with_two_decimals_and_unknown_ones_say_so(tmp_path):
    page, _ = page_of(a_run(baseline={"image_auroc": 0.975}, baseline_name="PaDiM"), tmp_path)
    table = page.within("td")[:9]
    assert table == [
        *("98.77%", "99.00%", "97.50%"),
        *("50.00%", "60.00%", "not available"),
        *("not available", "not available", "not available"),
    ]
    assert page.within("th")[:7] == [
        *("Metric", "Last epoch", "Best epoch", "PaDiM"),
        *("Image AUROC", "Pixel AUROC", "AUPRO"),
    ]
    assert " ".join(page.within("small")) == "best on the test set, for comparison only"


def test_a_threshold_is_drawn_and_what_it_does_is_told(tmp_path):
    decisions = {
        "false_alarms": 0.05,
        "held_out": 24,
        "rate_interval": [0.001, 0.14],
        "threshold": 0.55,
        "on_test": rates([0, 0, 0, None], np.array([0.1, 0.2, 0.9, 0.9]), 0.55),
    }
    page, _ = page_of(a_run(decisions=decisions), tmp_path)
    told = "Over the threshold 0.550: 1 of 3 good images (33.3%, 95% interval 0.8% to 90.6%)"
    assert told in " ".join(page.within("p"))
    assert "5.0% false alarms by 24 good images" in " ".join(page.within("span"))
    (line,) = (points_of(a) for a in page.all("polyline", **{"class": "threshold"}))
    assert line[0, 0] == line[1, 0]
    assert not page_of(a_run(), tmp_path)[0].all("polyline", **{"class": "threshold"})


def test_columns_that_nobody_measured_are_left_out(tmp_path):
    page, _ = page_of(a_run(best={}, baseline=None), tmp_path)
    assert page.within("th")[:3] == ["Metric", "Last epoch", "Image AUROC"]


def test_each_kind_of_defect_has_its_auroc_against_the_good_images_hardest_first(tmp_path):
    page, _ = page_of(a_run(metrics={}), tmp_path)
    assert page.within("td") == [
        *("3", "0.300"),
        *("2", "0.700", f"{100 * auroc([0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.5, 0.9]):.2f}%"),
        *("1", "0.800", "100.00%"),
    ]
    assert page.within("th")[-3:] == ["good", "scar", "blob"]


def test_the_gallery_puts_the_worst_mistakes_first(tmp_path):
    page, html = page_of(a_run(), tmp_path)
    assert page.within("b") == ["good/1", "scar/0", "good/2", "blob/0", "good/0", "scar/1"]
    assert re.findall("(?:above|below) [a-z0-9]+ of [^<]*", html) == [
        *("above 1 of 3 defective", "below 1 of 3 good"),
        *("above none of 3 defective", "below none of 3 good"),
        *("above none of 3 defective", "below none of 3 good"),
    ]
    assert len([a for a in page.all("figure") if "data-mistake" in a]) == 2


@pytest.mark.parametrize("step", [0.02, 2e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 0.7, -3000.0])
def test_scores_are_told_apart_however_close_they_are(tmp_path, step, offset):
    scores = [offset + step * i for i in range(6)]
    page, _ = page_of(a_run(scores=scores), tmp_path)
    shown = sorted(float(t.split(", ")[1]) for t in page.within("figcaption") if ", " in t)
    assert shown == pytest.approx(scores, rel=0, abs=0.1 * step)
    assert len(set(shown)) == 6


def test_unlabelled_images_come_last_the_highest_score_first(tmp_path):
    page, _ = page_of(a_run(labels=[0, None, None, 1, 1, None]), tmp_path)
    assert page.within("b") == ["scar/0", "good/0", "scar/1", "blob/0", "good/1", "good/2"]


def test_the_aupimo_of_images_and_their_kinds_is_shown_where_it_is_known(tmp_path):
    nan = float("nan")
    page, html = page_of(a_run(aupimo=[nan, nan, nan, 0.25, 0.5, nan]), tmp_path)
    found = f"{100 * auroc([0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.5, 0.9]):.2f}%"
    assert page.within("td")[-8:] == [
        *("2", "0.700", found, "37.50%"),
        *("1", "0.800", "100.00%", "not available"),
    ]
    assert re.findall(r"AUPIMO ([\d.]+%)", html) == ["25.00%", "50.00%"]
    assert "AUPIMO" not in page_of(a_run(), tmp_path)[1]


@pytest.fixture(scope="module")
def large_report(tmp_path_factory) -> tuple[Path, list[int]]:
    """A report on 2,100 noisy images, and which of them were asked for."""
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
    assert path.stat().st_size < 30e6  # of the worst case, noise with a mask of noise


def test_a_gallery_with_every_image_does_not_claim_to_be_cut(tmp_path):
    _, html = page_of(a_run(), tmp_path)
    assert "are shown" not in html


def test_large_pictures_are_made_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 3), np.uint8)
    page, _ = page_of(a_run(pictures=[(noise, noise[..., 0], None)] * 6), tmp_path)
    assert {decoded(a["src"]).size for a in page.all("img")} == {(171, 256)}


def test_every_slider_is_named_and_spans_the_layers(tmp_path):
    image, values, _ = a_run().pictures[0]
    masked = (image, values, np.eye(24, dtype=bool))
    for pictures, most in ((a_run().pictures, "1"), ([masked, *a_run().pictures[1:]], "2")):
        page, _ = page_of(a_run(pictures=pictures), tmp_path)
        sliders = page.all("input", type="range")
        assert [s["max"] for s in sliders] == [most] * 7
        assert all(s["aria-label"] for s in sliders)
        assert all(picture["alt"] for picture in page.all("img"))


@pytest.mark.parametrize("label", [0, 1, None], ids=["good", "defective", "unlabelled"])
def test_test_sets_of_one_class_are_reported_without_a_roc_curve(tmp_path, label):
    run = a_run(labels=[label] * 6, metrics={"image_auroc": None})
    page, html = page_of(run, tmp_path)
    assert "not available: needs good and defective test images" in page.within("p")
    assert len(page.within("b")) == 6
    assert "nan" not in re.sub(r"base64,[^\"]+", "", html)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": []},
        {"losses": [float("nan"), float("inf")]},
        {"scores": [1.0] * 6},
        {"scores": [1e-30 * i for i in range(6)]},
        {"scores": [1e30 * i for i in range(6)]},
        {"scores": [-1e9 + 1e-3 * i for i in range(6)]},
        {"losses": [0.0] * 5, "pictures": [], "facts": {}},
    ],
    ids=["no-loss", "bad-loss", "constant", "tiny", "huge", "offset", "bare"],
)
def test_extreme_numbers_still_give_a_readable_page(tmp_path, changes):
    page, _ = page_of(a_run(**changes), tmp_path)
    places = np.concatenate([points_of(a) for a in page.all("polyline")])
    assert (places >= 0).all()
    assert (places <= 340).all()
    axis = [a for t, a in page.tags if t == "line" and a.get("class") == "tick"]
    assert len(axis) >= 4


def test_a_run_without_any_test_image_is_reported(tmp_path):
    page, _ = page_of(first(a_run(), 0), tmp_path)
    assert "not available: no test image has a label" in page.within("p")


def test_a_name_that_is_not_unicode_does_not_stop_the_report(tmp_path):
    page, _ = page_of(a_run(names=[os.fsdecode(b"\xff%d" % i) for i in range(6)]), tmp_path)
    assert page.within("b")[0] == "?1"


def test_the_recipe_is_written_in_plain_words(tmp_path):
    page, _ = page_of(a_run(), tmp_path)
    assert page.within("dd") == ["2, 5, 8", "no", "none", "0.0001", "2.15.0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0]}, "run: labels has 1 entries for 6 names"),
        ({"pictures": [()]}, "run: pictures has 1 entries for 6 names"),
        ({"aupimo": [0.5]}, "run: aupimo has 1 entries for 6 names"),
        ({"scores": [float("nan")] * 6}, "run: the score of 'good/0' must be finite, got nan"),
        ({"labels": [2] * 6}, "run: the label of 'good/0' is 2, 0, 1 or None is wanted"),
    ],
    ids=["labels", "pictures", "aupimo", "nan", "class"],
)
def test_a_run_that_does_not_fit_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_report.write_report(tmp_path / "report.html", a_run(**changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600 * 26 + 61, "26 h 1 min")],
)
def test_the_time_is_written_in_words(tmp_path, seconds, words):
    page, _ = page_of(a_run(seconds=seconds), tmp_path)
    assert page.within("p")[0].endswith(f"· {words}")


def points_of(polyline: dict[str, str | None]) -> np.ndarray:
    text = polyline["points"] or ""
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])
