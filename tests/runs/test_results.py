"""Finished runs of any version are compared image by image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msflow_ext.runs.results import read_runs
from msflow_ext.runs.score_table import Row, write_scores

pytestmark = pytest.mark.family("score tables")
OLD = "name,defect,label,score\nscar/0,scar,1,0.5\ngood/0,good,0,0.25\n"


def finished(folder: Path, threshold: float) -> Path:
    facts = {part: {} for part in ("best", "model", "recipe", "data", "versions")}
    folder.mkdir()
    content = json.dumps({**facts, "decisions": {"threshold": threshold}})
    (folder / "metrics.json").write_text(content)
    return folder


def test_a_run_of_an_older_version_is_compared_with_a_new_one(tmp_path):
    old, new = finished(tmp_path / "old", 0.4), finished(tmp_path / "new", 0.4)
    (old / "scores.csv").write_text(OLD)
    rows = [Row("good/0.png", "good", 0, 0.4, 0), Row("scar/0.png", "scar", 1, 0.3, 0)]
    write_scores(new / "scores.csv", rows)
    first, second = read_runs([old, new])
    assert second.images == first.images == (("scar/0", "scar", 1), ("good/0", "good", 0))
    assert second.scores.tolist() == [0.3, 0.4]
    assert [run.maps[0].name for run in (first, second)] == ["scar-0.png"] * 2
    assert first.flagged is not None and first.flagged.tolist() == [True, False]


def test_flags_of_a_run_are_its_stored_verdicts(tmp_path):
    runs = [finished(tmp_path / name, 0.0) for name in "ab"]
    for verdict, run in enumerate(runs):
        write_scores(run / "scores.csv", [Row("a.png", "good", 0, 0.5, verdict)])
    flagged = [run.flagged for run in read_runs(runs)]
    assert [None if each is None else each.tolist() for each in flagged] == [[False], [True]]
