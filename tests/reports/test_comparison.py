"""Runs are compared on the same images; what differs comes first, and what cannot be compared is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msflow_ext import cli
from msflow_ext.reports import comparison, heat_maps
from msflow_ext.reports.heat_maps import read_panels
from msflow_ext.runs.curves import write_curves
from msflow_ext.runs.results import read_runs
from msflow_ext.runs.score_table import Row, write_scores

NAMES = ("good/0", "good/1", "good/2", "scar/0", "scar/1")
DEFECTS = ("good", "good", "good", "scar", "scar")
LABELS = (0, 0, 0, 1, 1)
NAN = float("nan")
PIXELS = ("ROC curve of the pixels", "PRO curve")
WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """``write_run("a", scores, **changes)``: the folder of a finished run on five images."""

    def write(
        name: str,
        scores: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
        *,
        names: Sequence[str] = NAMES,
        labels: Sequence[int | None] = LABELS,
        aupimo: Sequence[float] | None = (NAN, NAN, NAN, 0.5, 0.25),
        recipe: dict[str, Any] | None = None,
        threshold: float | None = None,
        **metrics: float | None,
    ) -> Path:
        folder = tmp_path / name
        known = {"image_auroc": 0.9, "aupro": None, **metrics}
        content = {
            **known,
            "epochs": 3,
            "best": {"chosen": "on the test set", **known, "epochs": {"image_auroc": 1}},
            "model": {"name": "MSFlow"},
            "recipe": {"epochs": 2, "lr": 1e-4, **(recipe or {})},
            "data": {"name": "squares", "category": "white"},
            "versions": {"torch": "2.15"},
        }
        if threshold is not None:
            content["decisions"] = {"threshold": threshold}
        columns = zip(names, DEFECTS, labels, scores, aupimo or [None] * 5, strict=True)
        rows = (Row(n, kind, truth, score, aupimo=each) for n, kind, truth, score, each in columns)
        write_scores(folder / "scores.csv", rows)
        (folder / "metrics.json").write_text(json.dumps(content))
        image, mask = np.full((16, 16, 3), 90, np.uint8), np.eye(16, dtype=bool)
        maps = [np.full((16, 16), score) for score in scores]
        masks = [mask if label else None for label in labels]
        heat_maps.save_maps(folder, names, [image] * 5, maps, masks, low=0, high=1)
        return folder

    return write


def test_the_table_has_values_and_differences_from_the_first_run(write_run):
    a = write_run("a", image_auroc=0.9, pixel_auroc=0.8)
    b = write_run("b", image_auroc=0.95, pixel_auroc=None, aupimo=None, extra=0.5)
    table = dict(comparison.table(read_runs([a, b])))
    assert table["image_auroc"] == [(0.9, None), (0.95, pytest.approx(0.05))]
    assert table["pixel_auroc"] == [(0.8, None), (None, None)]
    assert table["extra"] == [(None, None), (0.5, None)]
    assert table.keys() == {"image_auroc", "pixel_auroc", "extra"}  # nobody measured the others


@pytest.mark.parametrize(
    ("difference", "text"),
    [(0.05, "+5.00"), (-0.00126, "−0.13"), (-1e-9, "0.00"), (0.0, "0.00"), (None, "")],
)
def test_a_difference_has_its_sign_unless_it_rounds_to_nothing(difference, text):
    assert comparison.points(difference) == text


@pytest.mark.family("crafted files")
@pytest.mark.parametrize("decisions", [[1], "high", {"threshold": None}, {"threshold": "2"}, {}])
def test_decisions_without_a_threshold_are_damage(write_run, decisions):
    runs = [write_run("a"), write_run("b")]
    path = runs[1] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decisions": decisions}))
    if not decisions:  # nothing was decided
        assert read_runs(runs)[1].flagged is None
        return
    with pytest.raises(
        ValueError, match=r"metrics\.json is damaged: its decisions have no threshold"
    ):
        read_runs(runs)


def test_only_settings_that_differ_are_named(write_run):
    runs = [write_run("a"), write_run("b", recipe={"lr": 2e-4, "clip": 2.0})]
    found = comparison.settings(read_runs(runs))
    assert found == [("recipe: lr", [1e-4, 2e-4]), ("recipe: clip", [None, 2.0])]


def test_the_image_that_runs_judge_most_differently_comes_first(write_run):
    a = write_run("a", (0.1, 0.2, 0.3, 0.4, 0.5))
    b = write_run("b", (0.1, 0.2, 9.0, 1.0, 0.15))
    found = comparison.disagreements(read_runs([a, b]))
    assert [(NAMES[each.image], each.shares) for each in found] == [
        ("good/2", (0.0, 1.0)),
        ("scar/1", (0.0, pytest.approx(2 / 3))),
        ("good/1", (0.0, 0.5)),
        ("scar/0", (0.0, pytest.approx(1 / 3))),
        ("good/0", (0.0, 0.0)),
    ]
    assert found[0].verdicts == ("above 0 of 2 defective", "above 2 of 2 defective")
    assert found[1].verdicts == ("below 0 of 3 good", "below 2 of 3 good")


def test_thresholds_tell_what_they_flag(write_run):
    a = write_run("a", (0.1, 0.2, 0.3, 0.4, 0.5), threshold=0.25)
    b = write_run("b", (0.1, 0.2, 9.0, 1.0, 0.15))
    runs = read_runs([a, b])
    assert comparison.decisions(runs) == [
        ("good images flagged, of 3", [pytest.approx(1 / 3), None]),
        ("defective images flagged, of 2", [1.0, None]),
    ]
    assert comparison.disagreements(runs)[0].verdicts == (
        "flagged, above 0 of 2 defective",
        "above 2 of 2 defective",
    )
    assert any(
        line.startswith("good images flagged") and "33.33%" in line
        for line in comparison.lines(runs)
    )
    assert comparison.decisions(runs[1:]) == []


@pytest.mark.family("score tables")
def test_names_in_no_unicode_are_compared_and_printed(write_run, tmp_path, capsys):
    odd = (*NAMES[:2], "good/\udcff\r.png", "=scar.png", NAMES[4])
    runs = [write_run("a", names=odd), write_run("b", (0.1, 0.2, 9.0, 0.0, 0.15), names=odd)]
    page = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, runs), "--out", str(page)]) == 0
    assert "good/\\udcff" in capsys.readouterr().out
    assert "=scar.png" in page.read_text(encoding="utf-8", errors="surrogateescape")
    assert read_runs(runs)[0].images[2][0] == "good/\udcff\r.png"


def test_without_another_class_the_order_of_the_scores_is_compared(write_run):
    good = (0,) * 5
    a = write_run("a", (1, 2, 3, 4, 5), labels=good, aupimo=None)
    b = write_run("b", (1, 2, 3, 4, 0), labels=good, aupimo=None)
    runs = read_runs([a, b])
    first = comparison.disagreements(runs)[0]
    assert (NAMES[first.image], first.shares) == ("scar/1", (0.8, 0.0))
    comparison.write_comparison(a.parent / "page.html", runs)
    assert "needs good and defective test images" in (a.parent / "page.html").read_text()


def test_images_in_another_order_are_matched_by_name(write_run):
    a = write_run("a", (0.1, 0.2, 0.3, 0.4, 0.5))
    order = (0, 1, 2, 3, 4)[::-1]
    b = write_run("b")
    scores, aupimo = (0.1, 0.2, 0.3, 0.4, 0.5), (NAN, NAN, NAN, 0.5, 0.25)
    rows = [Row(NAMES[i], DEFECTS[i], LABELS[i], scores[i], aupimo=aupimo[i]) for i in order]
    write_scores(b / "scores.csv", rows)
    first, second = read_runs([a, b])
    assert second.images == first.images
    assert second.scores.tolist() == first.scores.tolist()
    assert second.maps[3] == b / "maps" / "scar-0.png"
    assert second.aupimo.tolist()[3:] == [0.5, 0.25]


def test_a_terminal_and_a_page_tell_the_same(write_run, tmp_path, capsys):
    a = write_run("a", image_auroc=0.9)
    b = write_run(
        "b", (0.1, 0.2, 9.0, 1.0, 0.15), image_auroc=0.85, aupimo=(NAN, NAN, NAN, 0.75, 0)
    )
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(a), str(b), "--out", str(page)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["a", "b"]
    assert printed[1].split() == ["Image", "AUROC", "90.00%", "85.00%", "\u22125.00"]
    worst = next(line for line in printed if line.startswith("good/2"))
    assert worst.split(maxsplit=1)[1] == "above 0 of 2 defective  above 2 of 2 defective"
    assert printed[-1] == str(page)
    html = page.read_text()
    assert len(re.findall('<td class="worse">85.00%<small>\u22125.00', html)) == 1
    for text in ("90.00%", "above 2 of 2 defective", "1 better, 1 worse"):
        assert text in html
    assert html.count("data:image/jpeg") == 4 * 3  # image and two heat maps where they disagree
    assert "://" not in html


def test_a_page_is_written_when_the_maps_are_gone(write_run, tmp_path):
    a, b = write_run("a"), write_run("b", (0.1, 0.2, 9.0, 1.0, 0.15))
    (b / "maps" / "good-2.png").unlink()
    (b / "maps" / "scar-1.png").write_bytes(b"no picture")
    comparison.write_comparison(tmp_path / "page.html", read_runs([a, b]))
    html = (tmp_path / "page.html").read_text()
    assert html.count("no pictures kept") == 2
    assert html.count("data:image/jpeg") == 2 * 3


def test_the_curves_of_the_pixels_are_drawn_for_the_runs_that_keep_them(write_run, tmp_path):
    folders = [write_run(name) for name in ("a", "b", "c")]
    without = page_of(read_runs(folders), tmp_path)
    assert "PRO curve" not in without
    curve = np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.8, 1.0])
    write_curves(folders[0], {"pixel_roc": curve})
    write_curves(folders[2], {"pixel_roc": curve, "pro": curve})
    drawn = page_of(read_runs(folders), tmp_path).split("<h3>")
    roc, pro = (next(part for part in drawn if part.startswith(title)) for title in PIXELS)
    assert re.findall('class="key (run-.)">(.)<', roc) == [("run-0", "a"), ("run-2", "c")]
    assert re.findall('polyline class="(run-.)"', pro) == ["run-2"]
    (folders[2] / "curves.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_runs(folders)


def test_hostile_names_are_shown_and_never_run(write_run, tmp_path):
    names = ("<script>alert(1)</script>", *NAMES[1:])
    a = write_run("a", (0.1, 0.2, 0.3, 0.4, 0.5), names=names)
    b = write_run("b", (9, 0.2, 0.3, 0.4, 0.5), names=names, recipe={"<b>": "<i>"})
    comparison.write_comparison(tmp_path / "page.html", read_runs([a, b]))
    html = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "&lt;b&gt;" in html


def test_runs_of_one_folder_name_go_by_their_paths(write_run):
    runs = read_runs([write_run("x/run"), write_run("y/run")])
    assert [run.name[-5:] for run in runs] == ["x/run", "y/run"]


def page_of(runs: Sequence[Any], folder: Path) -> str:
    comparison.write_comparison(folder / "page.html", runs)
    return (folder / "page.html").read_text()


def fails(capsys: pytest.CaptureFixture[str], *folders: Path) -> str:
    assert (
        cli.main(["compare", *map(str, folders), "--out", str(folders[0].parent / "x.html")]) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert not (folders[0].parent / "x.html").exists()
    return line


def test_what_cannot_be_compared_is_named_in_one_sentence(write_run, tmp_path, capsys):
    a = write_run("a")
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        folder = tmp_path / missing
        assert f"{folder} is not a finished run: it has no metrics.json" in fails(capsys, a, folder)
    assert "two different runs" in fails(capsys, a)
    assert "two different runs" in fails(capsys, a, a)
    unfinished = write_run("unfinished")
    (unfinished / "scores.csv").unlink()
    assert "unfinished is not a finished run: it has no scores.csv" in fails(capsys, a, unfinished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("good/9", *NAMES[1:])}, "(good/0|good/9) \\(good\\) is in one of them only"),
        ({"labels": (0, 0, 0, 1, 0)}, "5 against 5, scar/1"),
    ],
    ids=["names", "labels"],
)
def test_runs_on_other_test_images_are_refused(write_run, changes, message):
    with pytest.raises(ValueError, match=f"b was tested on other images than .*a: .*{message}"):
        read_runs([write_run("a"), write_run("b", **changes)])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", "[]", "must hold a JSON object, got list"),
        ("metrics.json", "{}", "metrics.json is damaged: it has no best"),
        ("scores.csv", "name,label\na,1\n", "scores.csv is damaged: it has no column score"),
        (
            "scores.csv",
            "name,defect,label,score\na,good,0,x\n",
            "scores.csv is damaged: could not convert string to float: 'x'",
        ),
        ("scores.csv", "name,defect,label,score\na,good,0,nan\n", "a score is not finite"),
        ("scores.csv", "name,defect,label,score\na\n", "scores.csv is damaged"),
        ("scores.csv", "name,defect,label,score\n", "scores.csv is damaged: it lists no image"),
    ],
)
def test_damaged_files_are_named(write_run, file, text, message):
    a, b = write_run("a"), write_run("b")
    (b / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs([a, b])


@pytest.mark.family("pages")
@pytest.mark.parametrize("shape", [(130, 130), (130, 66), (40, 300), (1, 9)], ids=str)
def test_panels_read_back_as_they_were_saved(tmp_path, shape):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (*shape, 3), np.uint8), np.eye(*shape, dtype=bool)
    values = rng.random(shape)
    (path,) = heat_maps.save_maps(tmp_path, ["a"], [image], [values], [mask], low=0, high=1)
    panels = read_panels(path)
    expected = (
        image,
        heat_maps.heat_map(image, values, low=0, high=1),
        heat_maps.mask_contour(image, mask),
    )
    for panel, want in zip(panels, expected, strict=True):
        assert np.array_equal(np.asarray(panel), np.asarray(want))


def test_panels_of_files_without_a_width_are_square_and_other_pictures_are_refused(tmp_path):
    Image.new("RGB", (130 + 2 + 130, 130)).save(tmp_path / "older.png")
    assert [panel.size for panel in read_panels(tmp_path / "older.png")] == [(130, 130)] * 2
    Image.new("RGB", (50, 20)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="must hold two or three panels"):
        read_panels(tmp_path / "other.png")
