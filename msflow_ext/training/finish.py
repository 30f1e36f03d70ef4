"""Finish a run: thresholds, baseline, results and last checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from msflow_ext.data import Images
from msflow_ext.evaluation.calibration import Calibration, judged
from msflow_ext.evaluation.evaluator import Evaluation, Truth, evaluate
from msflow_ext.files import write_text
from msflow_ext.models.padim import Padim
from msflow_ext.reports.results import write_results
from msflow_ext.runs.checkpoint import CHECKPOINT, previous, save_checkpoint
from msflow_ext.runs.folder import METRICS
from msflow_ext.training.features import Parts
from msflow_ext.training.resume import summary


class Metrics(TypedDict):
    """What ``metrics.json`` holds.

    Attributes:
        image_auroc, pixel_auroc, aupro: of the last epoch, from 0 to 1; None where the test set has not both classes.
        best: the same of the best epoch of each, which was chosen on the test set.
        epochs: how many were trained.
        losses: mean loss of each epoch.
        evaluations: epoch and metrics of each test.
        recipe, model, data, versions: what was trained, with what.
        baseline: the metrics of the baseline, where one was asked for.
        seconds: how long the training took.
        decisions: what the thresholds do on the test set, where images were held out.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    best: dict[str, Any]
    epochs: int
    losses: list[float]
    evaluations: list[dict[str, Any]]
    recipe: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, Any]
    baseline: dict[str, Any] | None
    seconds: float
    decisions: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Results of a training.

    Attributes:
        shown: test images as the report shows them.
        test: evaluation after the last epoch.
        calibration: scores of the held-out images; None without such images.
        baseline: name and metrics of the per-position Gaussian on the same features; None if not requested.
    """

    shown: Images
    test: Evaluation
    calibration: Calibration | None
    baseline: Mapping[str, Any] | None

    @classmethod
    def of(cls, test: Evaluation, model: Any, parts: Parts, *, baseline: bool) -> Outcome:
        """Score the held-out images with the trained model, and evaluate the baseline if requested."""
        calibration, gaussian = None, None
        if baseline:
            normal = parts.training
            padim = Padim().fit(normal.batches(parts.batch_size), normal.ranks.total)
            found = parts.evaluate(partial(padim.predict, size=parts.shown.size))
            gaussian = {"name": "PaDiM-style Gaussian", **found.metrics}
        if len(parts.held_out):
            nothing = Truth(None, None)
            found = evaluate(model.predict_features, parts.held_out, nothing, parts.batch_size)
            calibration = Calibration.of(found.scores, found.maps)
        return cls(parts.shown, test, calibration, gaussian)


def write_run(run: Path, model: Any, state: Mapping[str, Any], outcome: Outcome) -> None:
    """Write results, report, last checkpoint, and at the end ``metrics.json``, which marks the run as finished."""
    test, calibration = outcome.test, outcome.calibration
    metrics = summary(state, test.metrics)
    metrics |= {"baseline": outcome.baseline, "seconds": round(state["seconds"], 3)}
    if calibration:
        labels = [item.label for item in outcome.shown.items]
        rate = state["recipe"]["false_alarms"]
        metrics["decisions"] = judged(calibration, rate, labels, test.scores)
    colours = write_results(run, outcome.shown, test, metrics, calibration)
    last = {**state, "colours": colours, "calibration": calibration and asdict(calibration)}
    save_checkpoint(run / CHECKPOINT, last, model)
    previous(run / CHECKPOINT).unlink(missing_ok=True)
    write_text(run / METRICS, json.dumps(metrics, indent=1, allow_nan=False))
