"""Tables of scores are written completely or not at all, and read back unchanged."""

from __future__ import annotations

import csv
import math
import os

import pytest

from msflow_ext.runs.folder import bare_name
from msflow_ext.runs.score_table import HEADER, Row, read_scores, row_line, write_scores

pytestmark = pytest.mark.family("score tables")
ROWS = [
    Row("scar/0.png", "scar", 1, 0.1, 1, 0.25, 0.5),
    Row('a,"b"\n.png', "good", 0, 1e-30, 0, 1.0),
    Row("new\r.png", score=-2.5),
    Row("=1+1.png", error="=1+1.png is not an image"),
    Row(os.fsdecode(b"Gr\xf6\xdfe.png"), "good", 0, -1.0),
]
OLD_TRAINING = "name,defect,label,score,aupimo\nscar/0,scar,1,0.5,0.25\ngood/0,good,0,0.25,\n"
OLD_PREDICTION = "name,defect,label,score,p_value\na.png,,1,0.5,0.25\n"


def test_rows_are_read_back_unchanged(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS)
    assert read_scores(tmp_path / "scores.csv") == ROWS


def test_truth_and_verdict_are_separate_columns(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS[:2])
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == HEADER
    assert "label" not in first
    assert (first["truth"], first["verdict"], first["p_value_at_most"]) == ("1", "1", "0.25")
    assert (second["name"], second["aupimo"], second["error"]) == ('a,"b"\n.png', "", "")


def test_a_table_has_the_documented_bytes(tmp_path):
    write_scores(tmp_path / "scores.csv", [*ROWS[:1], *ROWS[3:]])
    assert (tmp_path / "scores.csv").read_bytes() == (
        b"name,defect,truth,score,verdict,p_value_at_most,aupimo,error\n"
        b"scar/0.png,scar,1,0.1,1,0.25,0.5,\n"
        b'"\'=1+1.png",,,,,,,"\'=1+1.png is not an image"\n'
        b'"Gr\xf6\xdfe.png",good,0,-1.0,,,,\n'
    )


def test_an_unknown_number_is_an_empty_cell():
    assert row_line(Row("a", "good", 0, 1.0, aupimo=math.nan)) == "a,good,0,1.0,,,,\n"


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_a_score_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path, score):
    write_scores(tmp_path / "scores.csv", ROWS)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(ValueError, match="score of 'b' must be finite, got"):
        write_scores(tmp_path / "scores.csv", [Row("b", "good", 0, score)])
    assert (tmp_path / "scores.csv").read_bytes() == before


def test_the_label_of_an_older_version_is_the_truth_in_runs_and_the_verdict_in_predictions(
    tmp_path,
):
    path = tmp_path / "scores.csv"
    path.write_text(OLD_TRAINING)
    assert read_scores(path) == [
        Row("scar/0", "scar", 1, 0.5, aupimo=0.25),
        Row("good/0", "good", 0, 0.25),
    ]
    path.write_text(OLD_PREDICTION)
    assert read_scores(path) == [Row("a.png", score=0.5, verdict=1, p_value_at_most=0.25)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has no column name"),
        ("name\na\n", "it has no column score"),
        ("name,score\na\n", "all rows must have 2 cells"),
        ("name,score\na,b\n", "could not convert string to float: 'b'"),
        ("name,truth,score\na,2,1\n", "truth and verdict must be 0, 1 or empty, got '2'"),
        ('name,score\n"a"b,1\n', "it is not CSV"),
    ],
)
def test_a_file_that_is_not_a_table_of_scores_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"scores\.csv is damaged: {reason}"):
        read_scores(tmp_path / "scores.csv")


def test_removing_the_suffix_of_a_name_keeps_other_dots():
    names = ("scar/006.png", "a.tar.JPEG", "v1.2", "a.b/c", "png", ".png")
    assert [*map(bare_name, names)] == ["scar/006", "a.tar", "v1.2", "a.b/c", "png", ""]
