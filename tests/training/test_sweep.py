"""A series runs each training in its own folder, and continues after a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msflow_ext.training import sweep
from msflow_ext.training.sweep import Trial, do_all, plan, refuse_old


def metrics_of(trial: Trial) -> dict:
    known = {"image_auroc": 0.5, "pixel_auroc": None, "aupro": None}
    data = {"name": "cups", "category": trial.category}
    model = {"name": "MSFlow", "backbone": "resnet18"}
    return {**known, "best": known, "baseline": None, "data": data, "model": model}


def test_folders_are_named_by_category_and_by_seeds_if_there_are_several():
    folders = [t.folder.as_posix() for t in plan(Path("out"), ["a", "b"], [0], [1])]
    assert folders == ["out/a", "out/b"]
    folders = [t.folder.as_posix() for t in plan(Path("out"), [None], [0, 1], [3])]
    assert folders == ["out/split-0", "out/split-1"]
    folders = [t.folder.as_posix() for t in plan(Path("out"), ["a"], [0, 1], [3, 4])]
    assert folders[1:3] == ["out/a/split-0/seed-4", "out/a/split-1/seed-3"]


def test_duplicate_and_missing_trials_are_refused():
    with pytest.raises(
        ValueError, match=r"seeds must have one value or more, each once, got \[1, 1\]"
    ):
        plan(Path("out"), ["a"], [0], [1, 1])
    with pytest.raises(ValueError, match="category must have one value or more"):
        plan(Path("out"), [], [0], [1])


def test_a_failure_is_recorded_and_the_other_trials_run(tmp_path):
    def train(trial: Trial) -> dict:
        if trial.category == "b":
            raise ValueError("b.png\nis empty")
        return metrics_of(trial)

    runs = do_all(plan(tmp_path, ["a", "b", "c"], [0], [0]), tmp_path, train, (ValueError,))
    assert [run.failure for run in runs] == ["", "b.png is empty", ""]
    assert [run.metrics is None for run in runs] == [False, True, False]
    written = json.loads((tmp_path / "table.json").read_text())["runs"]
    assert [run["failure"] for run in written] == ["", "b.png is empty", ""]


def test_an_unexpected_error_ends_the_series_and_keeps_the_table(tmp_path):
    def train(trial: Trial) -> dict:
        if trial.category == "b":
            raise KeyboardInterrupt
        return metrics_of(trial)

    with pytest.raises(KeyboardInterrupt):
        do_all(plan(tmp_path, ["a", "b"], [0], [0]), tmp_path, train, (ValueError,))
    (kept,) = json.loads((tmp_path / "table.json").read_text())["runs"]
    assert kept["category"] == "a"


@pytest.mark.parametrize("file", [sweep.METRICS, sweep.CHECKPOINT])
def test_folders_that_hold_runs_are_refused_before_training(tmp_path, file):
    trials = plan(tmp_path, ["a", "b"], [0], [0])
    refuse_old(trials)
    trials[1].folder.mkdir()
    (trials[1].folder / file).touch()
    with pytest.raises(ValueError, match="b holds a run: --resume continues"):
        refuse_old(trials)
