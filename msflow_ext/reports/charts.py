"""The line charts of a page, as coordinates that its template draws in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from msflow_ext.runs.curves import Curve, thinned

#: Legend, CSS class and curve.
Line: TypeAlias = tuple[str, str, Curve]

LEFT, TOP, RIGHT, BOTTOM = 36.0, 24.0, 330.0, 200.0  # the plot area in a 340 x 236 picture

CHANCE = ("chance", "chance", np.array([0.0, 100.0]), np.array([0.0, 100.0]))


@dataclass(frozen=True)
class Chart:
    """Curves and dots over one pair of axes; if there are none, ``note`` says why."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    curves: tuple[tuple[str, str, np.ndarray, np.ndarray], ...] = ()  # legend, CSS class, xs, ys
    dots: tuple[tuple[str, str, np.ndarray, np.ndarray], ...] = ()  # as ``curves``
    whole: bool = False  # x is a count: its ticks are whole numbers
    note: str = ""

    def points(self, xs: np.ndarray, ys: np.ndarray) -> str:
        """Return a curve as the ``points`` of an SVG polyline."""
        return " ".join(f"{across},{down}" for across, down in self.places(xs, ys))

    def places(self, xs: np.ndarray, ys: np.ndarray) -> list[tuple[str, str]]:
        """Return each point in coordinates of the picture."""
        across = LEFT + (RIGHT - LEFT) * (xs - self.x[0]) / (self.x[1] - self.x[0])
        down = BOTTOM - (BOTTOM - TOP) * (ys - self.y[0]) / (self.y[1] - self.y[0])
        return [(f"{a:.1f}", f"{d:.1f}") for a, d in zip(across, down, strict=True)]

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return the positions and labels of the ticks of the x axis."""
        scale = (RIGHT - LEFT) / (self.x[1] - self.x[0])
        return [(LEFT + scale * (v - self.x[0]), text) for v, text in _ticks(*self.x, self.whole)]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Return the positions and labels of the ticks of the y axis."""
        scale = (BOTTOM - TOP) / (self.y[1] - self.y[0])
        return [(BOTTOM - scale * (v - self.y[0]), text) for v, text in _ticks(*self.y)]


def histogram(
    good: np.ndarray,
    defective: np.ndarray,
    scores: Sequence[float],
    threshold: float | None = None,
) -> Chart:
    """Return the histogram of scores, in percent of each class so that class sizes do not matter."""
    chart = Chart("Scores", "anomaly score", "% of each class")
    if not len(good) and not len(defective):
        return replace(chart, note="no test image has a label")
    marked = [] if threshold is None else [threshold]
    edges = np.linspace(*_span([*scores, *marked]), 31)
    curves = []
    for name, values in (("good", good), ("defective", defective)):
        if len(values):
            share = 100.0 * np.histogram(values, edges)[0] / len(values)
            xs, ys = np.repeat(edges, 2), np.pad(np.repeat(share, 2), 1)
            curves.append((f"{name} ({len(values)})", name, xs, ys))
    top = 1.05 * max(float(ys.max()) for *_, ys in curves)
    for mark in marked:
        curves.append(("threshold", "threshold", np.full(2, mark), np.array([0.0, top])))
    return replace(chart, x=(edges[0], edges[-1]), y=(0.0, top), curves=tuple(curves))


def roc(lines: Sequence[Line], title: str = "ROC curve") -> Chart:
    """Return the chart of true positive against false positive rates, in percent."""
    chart = Chart(title, "false positive rate (%)", "true positive rate (%)")
    if not lines:
        return replace(chart, note="needs good and defective test images")
    drawn = [(name, kind, *thinned(100.0 * x, 100.0 * y)) for name, kind, (x, y) in lines]
    return replace(chart, x=(0.0, 100.0), y=(0.0, 100.0), curves=(*drawn, CHANCE))


def ranks(
    labels: Sequence[int | None], first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]
) -> Chart:
    """Return a scatter plot of each image's score percentile in two runs."""
    truth = np.array([-1 if label is None else label for label in labels], int)
    xs, ys = (100.0 * _percentiles(scores) for _, scores in (first, second))
    few = np.arange(len(truth))[:: len(truth) // 4000 + 1]
    dots = []
    for label, kind in ((0, "good"), (1, "defective"), (-1, "unlabeled")):
        if (chosen := few[truth[few] == label]).size:
            dots.append((kind, kind, xs[chosen], ys[chosen]))
    return Chart(
        "Order of the scores",
        f"percentile in {first[0]}",
        f"percentile in {second[0]}",
        x=(0.0, 100.0),
        y=(0.0, 100.0),
        curves=(("", *CHANCE[1:]),),
        dots=tuple(dots),
    )


def pro(lines: Sequence[Line]) -> Chart:
    """Return the chart of per-region overlap against the pixels' false positive rate, up to 30%."""
    chart = Chart("PRO curve", "false positive rate (%)", "per-region overlap (%)")
    if not lines:
        return replace(chart, note="needs masks of good and defective test images")
    drawn = []
    for name, kind, (fpr, overlap) in lines:
        kept = fpr < 0.3
        xs = np.append(fpr[kept], 0.3)
        ys = np.append(overlap[kept], np.interp(0.3, fpr, overlap))
        drawn.append((name, kind, *thinned(100.0 * xs, 100.0 * ys)))
    return replace(chart, x=(0.0, 30.0), y=(0.0, 100.0), curves=tuple(drawn))


def loss(losses: Sequence[float]) -> Chart:
    """Return the chart of the training loss per epoch, in nats per dimension."""
    chart = Chart("Training loss", "epoch", "nats per dimension", whole=True)
    values = np.asarray(losses, float)
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 2:
        return replace(chart, note="needs at least two epochs")
    few = known[np.unique(np.linspace(0, len(known) - 1, 1000).round().astype(int))]
    curve = ("", "line", few + 1.0, values[few])
    return replace(chart, x=(1.0, float(known[-1] + 1)), y=_span(values[few]), curves=(curve,))


def strip(values: Sequence[float], scores: Sequence[float]) -> str:
    """Return an SVG path with one tick per value, on the common axis of all ``scores``, 100 wide."""
    low, high = _span(scores)
    places = np.unique(np.round(100.0 * (np.asarray(values) - low) / (high - low) * 5) / 5)
    return "".join(f"M{place:.1f} 0v10" for place in places)


def _percentiles(scores: np.ndarray) -> np.ndarray:
    """Return the share of scores below each score; equal scores count half."""
    ranked = np.sort(scores)
    below, reached = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    return (below + reached) / (2 * max(len(scores), 1))


def _span(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the range of ``values`` with a small margin; it is never empty."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.02 * (high - low) or 0.5 * max(abs(low), 1e-9)
    return low - margin, high + margin


def _ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """Return about four to six round numbers from ``low`` to ``high``, with their labels."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5.0))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5.0)
    step = max(step, 1.0) if whole else step
    values = np.arange(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1) * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(float(v), f"{v:.{digits}f}" if 1e-4 <= step < 1e5 else f"{v:.2g}") for v in values]
