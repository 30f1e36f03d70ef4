"""Runs of an older version load, give the same scores and can be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from msflow_ext import MSFlow, cli, load
from msflow_ext.data import open_dataset
from msflow_ext.runs.checkpoint import CHECKPOINT, read_checkpoint, save_checkpoint
from msflow_ext.runs.results import read_runs
from msflow_ext.training import Recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")
OLD = Path(__file__).parents[1] / "fixtures" / "version_0_1_dev"
SAME: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4}  # other processors round differently


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Return the predictions of the older version."""
    return json.loads((OLD / "expected.json").read_text())


@pytest.mark.parametrize("run", ["finished", "fastflow"])
def test_an_older_run_gives_its_old_predictions(expected, run):
    images = sorted((OLD / "images/plate/test").rglob("*.png"))
    results = load(OLD / run, device="cpu").predict([str(path) for path in images])
    right = expected[run]
    assert [result.score for result in results] == pytest.approx(right["scores"], **SAME)
    assert [result.label for result in results] == right["labels"]
    assert [result.p_value for result in results] == right["p_values"]
    for result, part in zip(results, right["maps"], strict=True):
        np.testing.assert_allclose(result.map[::12, ::12], part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", ["finished", "fastflow"])
def test_an_older_run_gives_its_old_metrics(tmp_path, monkeypatch, run):
    monkeypatch.chdir(OLD)  # the run's settings have image paths relative to this folder
    assert cli.main(["evaluate", "--run", run, "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    right = json.loads((OLD / run / "metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "aupro", "aupimo"):
        assert found[name] == pytest.approx(right[name], abs=1e-3)
    assert found["decisions"]["detected"] == right["decisions"]["on_test"]["detected"]


def test_older_runs_are_read_for_a_comparison(expected):
    for run in read_runs([OLD / "finished", OLD / "fastflow"]):
        assert run.scores.tolist() == pytest.approx(expected[run.name]["scores"], **SAME)
        assert set(run.curves) == {"pixel_roc", "pro"}


def test_a_training_of_an_older_version_is_resumed_to_the_same_losses(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD / "interrupted", run)
    right = json.loads((OLD / "finished" / "metrics.json").read_text())
    settings = {k: v for k, v in right["model"].items() if k not in ("name", "position_base")}
    model = MSFlow(**settings, pretrained=False)
    recipe = Recipe(**{**right["recipe"], "milestones": tuple(right["recipe"]["milestones"])})
    dataset = open_dataset(OLD / "images", "mvtec", "plate")
    metrics = train(model, dataset, run, recipe, device="cpu", resume=True)
    assert metrics["losses"] == pytest.approx(right["losses"], rel=1e-5)
    assert [each["epoch"] for each in metrics["evaluations"]] == [1, 2, 3, 4]
    for found, before in zip(metrics["evaluations"], right["evaluations"], strict=True):
        assert found == pytest.approx(before, abs=1e-3)
    assert metrics["decisions"]["threshold"] == pytest.approx(  # pyright: ignore[reportTypedDictNotRequiredAccess]
        right["decisions"]["threshold"], **SAME
    )


def test_a_run_with_a_removed_setting_is_refused(tmp_path):
    header, _ = read_checkpoint(OLD / "finished" / CHECKPOINT)
    assert "position_base" not in header["config"]
    header["config"]["position_base"] = True
    save_checkpoint(tmp_path / CHECKPOINT, header, nn.Linear(1, 1))
    sentence = "was trained with position_base, .* which was removed: train the model again"
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)
