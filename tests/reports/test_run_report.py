"""A report is one well-formed HTML file that needs no network and runs no text from the data."""

from __future__ import annotations

import dataclasses
import os
import re
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
DECISIONS = {
    "false_alarms": 0.05,
    "held_out": 24,
    "rate_interval": [0.001, 0.14],
    "pixel_threshold": 1.0,
    "on_test": rates([0, 0, 0, None], np.array([0.1, 0.2, 0.9, 0.9]), 0.55),
}
HOSTILE = '<script>alert("x")</script> & \'"><img src=x onerror=alert(1)>'
VOID = {"meta", "img", "input", "br", "link", "hr"}


def first(run: run_report.ReportedRun, count: int) -> run_report.ReportedRun:
    parts = ("names", "defects", "labels", "scores", "pictures")
    return dataclasses.replace(run, **{name: getattr(run, name)[:count] for name in parts})


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("what", ["scores.csv", "report.html", "maps/a.png"])
def test_an_error_while_writing_keeps_the_old_file_and_leaves_no_others(
    tmp_path, monkeypatch, what, a_run
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


def test_a_report_is_well_formed_and_loads_nothing_from_the_network(tmp_path, a_run, page_of):
    page, html = page_of(a_run(), tmp_path)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]+", "", html))
    sources = [a["src"] or "" for t, a in page.tags if "src" in a]
    assert len(sources) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not page.all("link")
    assert not [a for _, a in page.tags if "href" in a]


@pytest.mark.parametrize("field", ["title", "names", "defects", "facts", "metrics"])
def test_hostile_text_is_shown_and_never_run(tmp_path, field, a_run, page_of):
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


def test_metrics_are_in_percent_with_two_decimals_or_not_available(tmp_path, a_run, page_of):
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
    assert " ".join(page.within("small")) == "chosen on the test set, for comparison only"


def test_a_threshold_is_drawn_and_explained(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(decisions={**DECISIONS, "threshold": 0.55}), tmp_path)
    assert "Threshold 0.550" in page.within("th")
    assert "33.3%, 95%: 0.84% to 90.6%" in page.within("small")
    assert "5.0% false alarms by 24 good images" in " ".join(page.within("p"))
    (line,) = (points_of(a) for a in page.all("polyline", **{"class": "threshold"}))
    assert line[0, 0] == line[1, 0]
    assert not page_of(a_run(), tmp_path)[0].all("polyline", **{"class": "threshold"})


def test_columns_without_values_are_left_out(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(best={}, baseline=None), tmp_path)
    assert page.within("th")[:3] == ["Metric", "Last epoch", "Image AUROC"]


def test_each_kind_of_defect_has_its_auroc_and_the_hardest_comes_first(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(metrics={}), tmp_path)
    assert page.within("td") == [
        *("3", "0.300"),
        *("2", "0.700", f"{100 * auroc([0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.5, 0.9]):.2f}%"),
        *("1", "0.800", "100.00%"),
    ]
    assert page.within("th")[-3:] == ["good", "scar", "blob"]


@pytest.mark.parametrize("step", [0.02, 2e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 0.7, -3000.0])
def test_close_scores_are_shown_with_enough_digits(tmp_path, step, offset, a_run, page_of):
    scores = [offset + step * i for i in range(6)]
    page, _ = page_of(a_run(scores=scores), tmp_path)
    shown = sorted(float(t.split(", ")[1]) for t in page.within("figcaption") if ", " in t)
    assert shown == pytest.approx(scores, rel=0, abs=0.1 * step)
    assert len(set(shown)) == 6


def test_the_aupimo_of_images_and_kinds_is_shown_if_known(tmp_path, a_run, page_of):
    nan = float("nan")
    page, html = page_of(a_run(aupimo=[nan, nan, nan, 0.25, 0.5, nan]), tmp_path)
    found = f"{100 * auroc([0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.5, 0.9]):.2f}%"
    assert page.within("td")[-8:] == [
        *("2", "0.700", found, "37.50%"),
        *("1", "0.800", "100.00%", "not available"),
    ]
    assert re.findall(r"AUPIMO ([\d.]+%)", html) == ["25.00%", "50.00%"]
    assert "AUPIMO" not in page_of(a_run(), tmp_path)[1]


@pytest.mark.parametrize("label", [0, 1, None], ids=["good", "defective", "unlabeled"])
def test_test_sets_of_one_class_are_reported_without_a_roc_curve(tmp_path, label, a_run, page_of):
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
def test_extreme_numbers_still_give_a_readable_page(tmp_path, changes, a_run, page_of):
    page, _ = page_of(a_run(**changes), tmp_path)
    places = np.concatenate([points_of(a) for a in page.all("polyline")])
    assert (places >= 0).all()
    assert (places <= 340).all()
    axis = [a for t, a in page.tags if t == "line" and a.get("class") == "tick"]
    assert len(axis) >= 4


def test_a_run_without_any_test_image_is_reported(tmp_path, a_run, page_of):
    page, _ = page_of(first(a_run(), 0), tmp_path)
    assert "not available: no test image has a label" in page.within("p")


def test_a_name_that_is_not_unicode_is_reported(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(names=[os.fsdecode(b"\xff%d" % i) for i in range(6)]), tmp_path)
    assert page.within("b")[0] == "?1"


def test_the_recipe_is_written_in_plain_words(tmp_path, a_run, page_of):
    page, _ = page_of(a_run(), tmp_path)
    assert page.within("dd") == ["2, 5, 8", "no", "none", "0.0001", "2.15.0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0]}, "labels must have 6 entries, one per name, got 1"),
        ({"pictures": [()]}, "pictures must have 6 entries, one per name, got 1"),
        ({"aupimo": [0.5]}, "aupimo must have 6 entries, one per name, got 1"),
        ({"scores": [float("nan")] * 6}, "the score of 'good/0' must be finite, got nan"),
        ({"labels": [2] * 6}, "the label of 'good/0' must be 0, 1 or None, got 2"),
    ],
    ids=["labels", "pictures", "aupimo", "nan", "class"],
)
def test_an_inconsistent_run_is_refused(tmp_path, changes, message, a_run):
    with pytest.raises(ValueError, match=message):
        run_report.write_report(tmp_path / "report.html", a_run(**changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600 * 26 + 61, "26 h 1 min")],
)
def test_the_training_time_is_written_with_units(tmp_path, seconds, words, a_run, page_of):
    page, _ = page_of(a_run(seconds=seconds), tmp_path)
    assert page.within("p")[0].endswith(f" in {words}")


@pytest.mark.family("pages")
def test_the_head_names_model_run_and_date(tmp_path, a_run, page_of):
    facts = {"model": {"name": "MSFlow", "backbone": "resnet18"}}
    page, _ = page_of(a_run(facts=facts, name="plates-3", date="2026-11-30 18:45+00:00"), tmp_path)
    head = page.within("p")[0]
    assert head.startswith(
        "MSFlow with resnet18 · run plates-3 · 6 test images: 3 good, 3 defective"
    )
    assert head.endswith("2026-11-30 18:45+00:00")


@pytest.mark.family("pages")
def test_the_confusion_matrix_is_counted_and_every_image_has_a_verdict(tmp_path, a_run, page_of):
    scores = [0.1, 0.2, 0.9, 0.5, 0.6, 0.7]
    on_test = rates([0, 0, 0, 1, 1, 1], np.array(scores), 0.55)
    run = a_run(scores=scores, decisions={**DECISIONS, "threshold": 0.55, "on_test": on_test})
    page, html = page_of(run, tmp_path)
    cells = [text for text in page.within("td") if re.fullmatch(r"\d of \d", text)]
    assert cells == ["2 of 3", "1 of 3", "1 of 3", "2 of 3"]
    assert re.findall(r'class="verdict (\w+)"', html).count("flagged") == 3
    shows = [str(a["data-show"]).split() for a in page.all("figure", **{"class": "card"})]
    assert sum("alarm" in each for each in shows) == sum("missed" in each for each in shows) == 1


@pytest.mark.family("pages")
def test_a_run_without_a_threshold_has_no_verdicts_and_says_how_to_get_them(
    tmp_path, a_run, page_of
):
    page, html = page_of(a_run(), tmp_path)
    assert any("Train with --hold-out" in text for text in page.within("p"))
    assert 'class="verdict' not in html


@pytest.mark.family("pages")
@pytest.mark.parametrize(
    ("pixel_threshold", "left"), [(1.0, "50.0%"), (-3.0, "0%"), (9.0, "100%"), (0.5, "25.0%")]
)
def test_the_color_scale_has_a_tick_at_the_pixel_threshold(
    tmp_path, pixel_threshold, left, a_run, page_of
):
    decisions = {**DECISIONS, "threshold": 0.55, "pixel_threshold": pixel_threshold}
    _, html = page_of(a_run(colours=(0.0, 2.0), decisions=decisions), tmp_path)
    places = re.findall(r'<b style="left: ([\d.]+)%" title="pixel threshold', html)
    assert [float(place) for place in places] == [float(left[:-1])] * 2


def points_of(polyline: dict[str, str | None]) -> np.ndarray:
    text = polyline["points"] or ""
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])
