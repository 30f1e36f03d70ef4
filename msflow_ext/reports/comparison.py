"""Compare finished runs: their metrics, their settings, and the images on which they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.metrics import roc_curve
from msflow_ext.reports import charts as _charts
from msflow_ext.reports.gallery import jpeg_uri, worst_first
from msflow_ext.reports.heat_maps import read_panels
from msflow_ext.reports.html import metric_name, percent, plain, points, score_format, write_page
from msflow_ext.runs.curves import Curve
from msflow_ext.runs.results import SETTINGS, TestedRun
from msflow_ext.text_table import text_table

PICTURED = 24  # images that a page shows with heat maps


@dataclass(frozen=True)
class Disagreement:
    """An image and, for each run, how badly the image is ranked.

    Attributes:
        image: index of the image.
        shares: one number per run. For a good image: the share of defective images with a lower
            score. For a defective image: the share of good images with a higher score. Without
            images of the other class: the share of all images with a lower score.
        verdicts: the same in words, one per run.
    """

    image: int
    shares: tuple[float, ...]
    verdicts: tuple[str, ...]

    @property
    def spread(self) -> float:
        """Return the largest difference between two runs."""
        return max(self.shares) - min(self.shares)


def disagreements(runs: Sequence[TestedRun]) -> list[Disagreement]:
    """Return the images of the runs; those on which the runs disagree most come first."""
    labels = [label for *_, label in runs[0].images]
    columns = [_shares(labels, run) for run in runs]
    found = []
    for i, values in enumerate(zip(*columns, strict=True)):
        shares, verdicts = zip(*values, strict=True)
        found.append(Disagreement(i, shares, verdicts))
    return sorted(found, key=lambda each: -each.spread)


def table(runs: Sequence[TestedRun]) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
    """Return, per metric, its name and each run's value and difference from the first run."""
    keys = dict.fromkeys(key for run in runs for key in run.metrics["best"])
    keys = [key for key in keys if key not in ("chosen", "epochs")]  # not metrics
    rows = []
    for key in keys:
        values = [_number(run.metrics.get(key)) for run in runs]
        if any(value is not None for value in values):
            differences = [None, *(_difference(value, values[0]) for value in values[1:])]
            rows.append((key, list(zip(values, differences, strict=True))))
    return rows


def decisions(runs: Sequence[TestedRun]) -> list[tuple[str, list[float | None]]]:
    """Return the shares of good and defective images above each run's threshold, if a run has one."""
    rows = []
    for index, kind in enumerate(("good", "defective")):
        members = np.array([label == index for *_, label in runs[0].images], bool)
        shares: list[float | None] = []
        for run in runs:
            over = run.flagged
            shares.append(
                None if over is None or not members.any() else float(over[members].mean())
            )
        if any(share is not None for share in shares):
            rows.append((f"{kind} images flagged, of {members.sum()}", shares))
    return rows


def settings(runs: Sequence[TestedRun]) -> list[tuple[str, list[Any]]]:
    """Return the settings in which the runs differ, with one value per run."""
    flat = [
        {f"{part}: {key}": value for part in SETTINGS for key, value in run.metrics[part].items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = ((key, [each.get(key) for each in flat]) for key in keys)
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def lines(runs: Sequence[TestedRun], count: int = 10) -> list[str]:
    """Return the comparison as lines of text, with the ``count`` images on which the runs disagree most."""
    names = [run.name for run in runs]
    rows = [("", *names)]
    for key, values in table(runs):
        cells = ("-" if v is None else f"{percent(v)} {points(d):>7}" for v, d in values)
        rows.append((metric_name(key), *cells))
    rows += [(kind, *map(percent, shares)) for kind, shares in decisions(runs)]
    rows += [(key, *(plain(value)[:30] for value in values)) for key, values in settings(runs)]
    found = [each for each in disagreements(runs)[:count] if each.spread > 0]
    if not found:
        return text_table(rows)
    verdicts = [("images on which the runs disagree most", *names)]
    verdicts += [(runs[0].images[each.image][0][-40:], *each.verdicts) for each in found]
    return [*text_table(rows), "", *text_table(verdicts)]


def write_comparison(path: str | Path, runs: Sequence[TestedRun]) -> None:
    """Write the comparison as one self-contained HTML file.

    It shows the 24 images on which the runs disagree most, and lists the next 200. Heat maps come
    from ``maps/`` in the run folders, if all runs still have them.
    """
    labels = [label for *_, label in runs[0].images]
    scored = [(run.name, run.scores) for run in runs]
    found = [each for each in disagreements(runs) if each.spread > 0]
    write_page(
        Path(path),
        "compare.html",
        runs=runs,
        formats=[score_format(run.scores.tolist()) for run in runs],
        table=table(runs),
        decisions=decisions(runs),
        settings=settings(runs),
        wins=[_wins(runs[0], run) for run in runs],
        charts=[_roc(runs, labels)]
        + [_charts.ranks(labels, scored[0], other) for other in scored[1:]]
        + _of_pixels(runs),
        cards=[(each, _pictures(runs, each.image)) for each in found[:PICTURED]],
        rest=found[PICTURED : PICTURED + 200],
        disagreeing=len(found),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _difference(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


def _shares(labels: Sequence[int | None], run: TestedRun) -> list[tuple[float, str]]:
    """Return the share and verdict of each image, see :class:`Disagreement`."""
    _, confused = worst_first(labels, run.scores.tolist())
    others = {0: labels.count(1), 1: labels.count(0)}
    ranked, flagged = np.sort(run.scores), run.flagged
    values = []
    for i, (label, wrong) in enumerate(zip(labels, confused, strict=True)):
        decided = "" if flagged is None else "flagged, " if flagged[i] else "passed, "
        if wrong is None or label is None:
            below = int(np.searchsorted(ranked, run.scores[i]))
            values.append((below / len(ranked), f"{decided}above {below} of {len(ranked)}"))
        else:
            side, other = (("above", "defective"), ("below", "good"))[label]
            verdict = f"{decided}{side} {wrong} of {others[label]} {other}"
            values.append((wrong / others[label], verdict))
    return values


def _roc(runs: Sequence[TestedRun], labels: Sequence[int | None]) -> _charts.Chart:
    known = np.array([label is not None for label in labels], bool)
    truth = np.array([label == 1 for label in labels], bool)[known]
    if truth.all() or not truth.any():
        return _charts.roc([])
    return _charts.roc(_lines(runs, [roc_curve(truth, run.scores[known]) for run in runs]))


def _of_pixels(runs: Sequence[TestedRun]) -> list[_charts.Chart]:
    """Return the charts of pixels, for the runs that have these curves."""
    roc, pro = (
        _lines(runs, [run.curves.get(name) for run in runs]) for name in ("pixel_roc", "pro")
    )
    charts = [_charts.roc(roc, "Pixel ROC curve")] if roc else []
    return charts + ([_charts.pro(pro)] if pro else [])


def _lines(runs: Sequence[TestedRun], found: Sequence[Curve | None]) -> list[_charts.Line]:
    """Return the curve of each run that has one, in the color of the run."""
    return [
        (run.name, f"run-{k % 6}", curve)
        for k, (run, curve) in enumerate(zip(runs, found, strict=True))
        if curve is not None
    ]


def _wins(first: TestedRun, run: TestedRun) -> tuple[int, int] | None:
    """Return on how many images a run's AUPIMO is above, and below, the first run's; None if unknown."""
    difference = (run.aupimo - first.aupimo)[~np.isnan(run.aupimo) & ~np.isnan(first.aupimo)]
    if run is first or not difference.size:
        return None
    return int((difference > 0).sum()), int((difference < 0).sum())


def _pictures(runs: Sequence[TestedRun], image: int) -> list[str]:
    """Return the image with its mask outline and the heat map of each run; empty if one is missing."""
    shown = []
    for run in runs:
        try:
            picture, heat, *outlined = read_panels(run.maps[image])
        except (OSError, ValueError):
            return []
        shown += [heat] if shown else [*(outlined or [picture]), heat]
    for each in shown:
        each.thumbnail((256, 256))
    return [jpeg_uri(each, 100_000) for each in shown]
