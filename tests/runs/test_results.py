"""Tables of scores read back as they were written, whole or not at all."""

from __future__ import annotations

import csv
import os

import pytest

from msflow_ext.runs.results import write_scores

ROWS = (("scar/0", "scar", 1, 0.1), ('a,"b"\n', "good", 0, 1e-30), ("new", "", None, -2.5))


def test_what_is_written_reads_back_unchanged(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS)
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [
        (r["name"], r["defect"], int(r["label"]) if r["label"] else None, float(r["score"]))
        for r in read
    ] == list(ROWS)


def test_further_columns_of_scores_are_empty_where_nothing_is_known(tmp_path):
    rows = [("a", "good", 0, 1.0), ("b", "scar", 1, 2.0), ("c", "scar", 1, 3.0)]
    write_scores(tmp_path / "s.csv", rows, p_value=[0.5, None, float("nan")], aupimo=None)
    assert (tmp_path / "s.csv").read_text().splitlines() == [
        "name,defect,label,score,p_value",
        "a,good,0,1.0,0.5",
        "b,scar,1,2.0,",
        "c,scar,1,3.0,",
    ]


def test_a_file_name_that_is_not_unicode_keeps_its_bytes(tmp_path):
    write_scores(tmp_path / "scores.csv", [(os.fsdecode(b"\xff.png"), "good", 0, 1.0)])
    assert b"\n\xff.png,good,0,1.0\n" in (tmp_path / "scores.csv").read_bytes()


def test_the_aupimo_of_each_image_is_a_fifth_column(tmp_path):
    columns = {"aupimo": [0.5, float("nan"), 0.0], "p_value": None}
    write_scores(tmp_path / "scores.csv", ROWS, **columns)
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"name", "defect", "label", "score", "aupimo"}
    assert [row["aupimo"] for row in rows] == ["0.5", "", "0.0"]


def test_a_score_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(ValueError, match="the score of 'b' must be finite, got nan"):
        write_scores(tmp_path / "scores.csv", [("b", "good", 0, float("nan"))])
    assert (tmp_path / "scores.csv").read_bytes() == before
