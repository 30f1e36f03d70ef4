"""Write the results of a finished run: scores, curves, heat maps and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.data import Images
from msflow_ext.data.dataset import Item
from msflow_ext.data.images import resized
from msflow_ext.evaluation.calibration import Calibration, exceeds
from msflow_ext.evaluation.evaluator import Evaluation
from msflow_ext.runs.curves import write_curves
from msflow_ext.runs.score_table import Row, write_scores


def score_rows(
    items: Sequence[Item],
    found: Evaluation,
    threshold: float | None,
    calibration: Calibration | None,
) -> list[Row]:
    """Return the rows of ``scores.csv`` of a test set; without threshold or calibration, without verdicts or p-values."""
    aupimo = [None] * len(items) if found.aupimo is None else found.aupimo.tolist()
    return [
        Row(
            item.listed_name,
            item.defect,
            item.label,
            score,
            None if threshold is None else int(exceeds(score, threshold)),
            None if calibration is None else calibration.p_value(score),
            each,
        )
        for item, score, each in zip(items, found.scores.tolist(), aupimo, strict=True)
    ]


def write_results(
    folder: Path,
    images: Images,
    found: Evaluation,
    metrics: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> tuple[float, float] | None:
    """Write scores, curves, ``maps/*.png`` and ``report.html``, and return the color range of the maps."""
    from msflow_ext.reports import heat_maps, run_report

    items = images.items
    names = [item.listed_name for item in items]
    defects, labels = [item.defect for item in items], [item.label for item in items]
    scores = found.scores.tolist()
    decisions = metrics.get("decisions")
    rows = score_rows(items, found, decisions and decisions["threshold"], calibration)
    write_scores(folder / "scores.csv", rows)
    write_curves(folder, found.curves)
    colours = heat_maps.colour_range(found.maps) if items else None
    if colours:
        low, high = colours
        shown, maps, masks = tee(_Pictures(images, found.maps), 3)
        columns = (p for p, *_ in shown), (m for _, m, _ in maps), (m for *_, m in masks)
        heat_maps.save_maps(folder, names, *columns, low=low, high=high)
    baseline = metrics.get("baseline")
    run = run_report.ReportedRun(
        title=f"{metrics['data']['name']} {metrics['data']['category']}",
        name=folder.resolve().name,
        date=datetime.now().astimezone().isoformat(" ", "minutes"),
        metrics={name: metrics[name] for name in found.metrics},
        best={name: metrics["best"][name] for name in found.metrics},
        baseline=baseline and {name: baseline[name] for name in found.metrics},
        baseline_name=baseline["name"] if baseline else "",
        epochs=metrics["epochs"],
        seconds=metrics["seconds"],
        names=names,
        defects=defects,
        labels=labels,
        scores=scores,
        aupimo=() if found.aupimo is None else found.aupimo.tolist(),
        decisions=decisions,
        curves=found.curves,
        losses=metrics["losses"],
        pictures=_Pictures(images, found.maps),
        colours=colours or (0.0, 1.0),
        facts={part: metrics[part] for part in ("recipe", "model", "data", "versions")},
    )
    run_report.write_report(folder / "report.html", run)
    return colours


class _Pictures(Sequence["tuple[np.ndarray, np.ndarray, np.ndarray | None]"]):
    """Image, anomaly map and mask of each test image in its aspect ratio, read on access."""

    def __init__(self, images: Images, maps: np.ndarray) -> None:
        self._images, self._maps = images, maps

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: Any) -> Any:
        picture, mask = self._images.shown(i)
        return picture, resized(self._maps[i], *picture.shape[:2]), mask
