"""Write the report of a run as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.evaluation.calibration import KINDS, exceeds, explained
from msflow_ext.metrics import auroc, roc_curve
from msflow_ext.reports import charts
from msflow_ext.reports.gallery import MOST, Picture, draw_layers, worst_first
from msflow_ext.reports.html import duration, score_format, write_page


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """The contents of a report: one trained run and its results on test images.

    Metrics are fractions; None means unknown.

    Attributes:
        title: title of the page.
        metrics, best, baseline: metrics of the last epoch, of the best epoch, and of a baseline.
        epochs, seconds: length of the training.
        names: one name per test image.
        defects: kind of defect of each image.
        labels: label of each image: 0 good, 1 defective, None unknown.
        scores: anomaly score of each image.
        aupimo: AUPIMO of each image, NaN where undefined; empty if unknown.
        decisions: result of :func:`msflow_ext.evaluation.calibration.judged`; None without a threshold.
        curves: false positive rates and ordinates of the curves ``"pixel_roc"`` and ``"pro"``.
        baseline_name: name of the baseline.
        losses: training loss of each epoch, in nats per dimension.
        pictures: image ``(H, W, 3)`` uint8, anomaly map ``(H, W)``, and mask ``(H, W)`` bool or None,
            for each test image; empty for no gallery. An entry is read once, and only if it is shown.
        colours: range of map values that heat maps show, ``(low, high)``.
        facts: recipe, model, data and versions, shown as tables.
        name: name of the run.
        date: time of the test.
    """

    title: str
    metrics: Mapping[str, float | None]
    best: Mapping[str, float | None]
    epochs: int
    seconds: float
    names: Sequence[str]
    defects: Sequence[str]
    labels: Sequence[int | None]
    scores: Sequence[float]
    aupimo: Sequence[float] = ()
    decisions: Mapping[str, Any] | None = None
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    baseline: Mapping[str, float | None] | None = None
    baseline_name: str = "Gaussian baseline"
    losses: Sequence[float] = ()
    pictures: Sequence[Picture] = ()
    colours: tuple[float, float] = (0.0, 1.0)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name: str = ""
    date: str = ""


def write_report(path: str | Path, run: ReportedRun) -> None:
    """Write the report of a run as one self-contained HTML file.

    The gallery shows at most 2000 images in at most 24 MB, the worst mistakes first. If it does not
    show all images, the page says so.

    Raises:
        ValueError: the sequences of ``run`` have different lengths, a score is not finite, or a
            label is not 0, 1 or None.
    """
    _check_run(run)
    labels, scores = np.array(run.labels, dtype=object), np.asarray(run.scores, dtype=float)
    good, defective = scores[labels == 0], scores[labels == 1]
    kinds = _kinds(run, good)
    threshold = run.decisions["threshold"] if run.decisions else None
    counts = {
        "good": len(good),
        "defective": len(defective),
        "unlabeled": len(run.names) - len(good) - len(defective),
    }
    write_page(
        Path(path),
        "report.html",
        run=run,
        outcomes=KINDS,
        explained=run.decisions and explained(run.decisions),
        score=score_format(run.scores),
        counts=counts,
        head=_head(run, counts),
        charts=[
            charts.histogram(good, defective, run.scores, threshold),
            charts.roc(_rocs(run, good, defective)),
            charts.pro([("", "line", run.curves["pro"])] if "pro" in run.curves else []),
            charts.loss(run.losses),
        ],
        kinds=kinds,
        gallery=_gallery(run, [kind["name"] for kind in kinds]) if len(run.pictures) else [],
    )


def _check_run(run: ReportedRun) -> None:
    optional = (name for name in ("aupimo", "pictures") if len(getattr(run, name)))
    for name in ("defects", "labels", "scores", *optional):
        if len(getattr(run, name)) != len(run.names):
            raise ValueError(
                f"{name} must have {len(run.names)} entries, one per name, got {len(getattr(run, name))}"
            )
    for name, score, label in zip(run.names, run.scores, run.labels, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the score of {name!r} must be finite, got {score}")
        if label not in (0, 1, None):
            raise ValueError(f"the label of {name!r} must be 0, 1 or None, got {label!r}")


def _rocs(run: ReportedRun, good: np.ndarray, defective: np.ndarray) -> list[charts.Line]:
    """Return the ROC curves of images and of pixels, where they are known."""
    lines = []
    if len(good) and len(defective):
        labels = np.repeat([0, 1], [len(good), len(defective)])
        lines.append(("images", "line", roc_curve(labels, np.concatenate([good, defective]))))
    if "pixel_roc" in run.curves:
        lines.append(("pixels", "second", run.curves["pixel_roc"]))
    return lines


def _head(run: ReportedRun, counts: Mapping[str, int]) -> list[str]:
    """Return the line below the title: model, run, test images, training time and date."""
    model = run.facts.get("model", {})
    known = [str(model[key]) for key in ("name", "backbone") if model.get(key)]
    images = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    parts = [
        " with ".join(known),
        run.name and f"run {run.name}",
        f"{len(run.names)} test images: {images}" if images else "no test images",
        f"{run.epochs} epoch{'' if run.epochs == 1 else 's'} in {duration(run.seconds)}",
        run.date,
    ]
    return [part for part in parts if part]


def _flagged(run: ReportedRun, i: int) -> bool | None:
    """Return whether an image's score exceeds the run's threshold; None without a threshold."""
    decisions = run.decisions
    return None if decisions is None else bool(exceeds(run.scores[i], decisions["threshold"]))


def _kinds(run: ReportedRun, good: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows of the table of defects: good images, then the hardest kind of defect first."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i in range(len(run.names)):
        groups.setdefault(_group(run, i), []).append(i)
    rows = []
    for (label, name), members in groups.items():
        scores = [float(run.scores[i]) for i in members]
        found = None
        if label == 1 and len(good):
            found = auroc([0] * len(good) + [1] * len(scores), [*good, *scores])
        known = (
            [run.aupimo[i] for i in members if not math.isnan(run.aupimo[i])]
            if len(run.aupimo)
            else []
        )
        rows.append(
            {
                "label": label,
                "name": name,
                "count": len(scores),
                "mean": float(np.mean(scores)),
                "auroc": found,
                "aupimo": float(np.mean(known)) if known else None,
                "strip": charts.strip(scores, run.scores),
            }
        )
    return sorted(rows, key=lambda r: (r["label"], r["auroc"] or 0.0, r["name"]))


def _group(run: ReportedRun, i: int) -> tuple[int, str]:
    """Return the class of an image (0 good, 1 defective, 2 unlabeled) and its kind of defect."""
    label = run.labels[i]
    return (2, "unlabeled") if label is None else (label, run.defects[i] if label else "good")


def _gallery(run: ReportedRun, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cards of the gallery, the worst mistake first."""
    order, confused = worst_first(run.labels, run.scores)
    others = {0: run.labels.count(1), 1: run.labels.count(0)}
    shown = order[:MOST]
    pictures = draw_layers((run.pictures[i] for i in shown), len(shown), run.colours)

    def verdict(i: int) -> str:
        wrong, label = confused[i], run.labels[i]
        if wrong is None or label is None:
            return ""
        side, other = (("above", "defective"), ("below", "good"))[label]
        return f"{side} {wrong or 'none'} of {others[label]} {other}"

    return [
        {
            "name": run.names[i],
            "kind": kind,
            "group": kinds.index(kind),
            "label": label,
            "score": float(run.scores[i]),
            "mistake": bool(confused[i]),
            "flagged": _flagged(run, i),
            "verdict": verdict(i),
            "aupimo": None if not len(run.aupimo) or math.isnan(run.aupimo[i]) else run.aupimo[i],
            "layers": picture,
        }
        for i, picture in zip(shown, pictures, strict=True)
        for label, kind in [_group(run, i)]
    ]
