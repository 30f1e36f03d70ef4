"""Finished runs, read from their folders, with the same test images in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.files import read_json
from msflow_ext.runs.checkpoint import is_number
from msflow_ext.runs.curves import Curve, read_curves
from msflow_ext.runs.folder import METRICS, bare_name, map_paths
from msflow_ext.runs.score_table import read_scores

SETTINGS = ("model", "recipe", "data", "versions")


@dataclass(frozen=True)
class TestedRun:
    """Finished run, read from its folder.

    Attributes:
        images: name, kind of defect and truth of each test image.
        maps: path of each image's map.
        scores: ``(N,)``.
        aupimo: ``(N,)``, NaN where it is undefined.
        flagged: whether each image is above the run's threshold, ``(N,)`` bool; None without a threshold.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    images: tuple[tuple[str, str, int | None], ...]
    maps: tuple[Path, ...]
    scores: np.ndarray
    aupimo: np.ndarray
    flagged: np.ndarray | None
    curves: Mapping[str, Curve]


def read_runs(folders: Sequence[str | Path]) -> list[TestedRun]:
    """Read finished runs that were tested on the same images, in the order of the first.

    Raises:
        FileNotFoundError: a folder is not a finished run.
        ValueError: there are fewer than two runs, or duplicates; a file is damaged; or the test images differ.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        given = ", ".join(map(str, paths))
        raise ValueError(f"folders must be two different runs or more, got {given}")
    names = [path.resolve().name for path in paths]
    short = len(set(names)) == len(names)
    first, *others = (
        _read(path, name if short else str(path)) for path, name in zip(paths, names, strict=True)
    )
    return [first, *(_in_order_of(first, other) for other in others)]


def _read(folder: Path, name: str) -> TestedRun:
    for file in (METRICS, "scores.csv"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not a finished run: it has no {file}")
    metrics = read_json(folder / METRICS)
    for part in ("best", *SETTINGS):
        if not isinstance(metrics.get(part), dict):
            raise ValueError(f"{folder / METRICS} is damaged: it has no {part}")
    decisions = metrics.get("decisions") or {}
    if not isinstance(decisions, dict) or (decisions and not is_number(decisions.get("threshold"))):
        raise ValueError(f"{folder / METRICS} is damaged: its decisions have no threshold")
    table = folder / "scores.csv"
    rows = read_scores(table)
    if not rows:
        raise ValueError(f"{table} is damaged: it lists no image")
    scores = np.array([row.score for row in rows], float)
    aupimo = np.array([row.aupimo for row in rows], float)
    if not np.isfinite(scores).all():
        raise ValueError(f"{table} is damaged: a score is not finite")
    images = tuple((row.name, row.defect, row.truth) for row in rows)
    maps = tuple(map_paths(folder, (image for image, *_ in images)))
    verdicts = [row.verdict for row in rows]
    flagged = None if None in verdicts else np.array(verdicts, bool)
    if flagged is None and decisions:  # an older version wrote no verdicts, and compared like this
        flagged = scores > decisions["threshold"]
    curves = read_curves(folder)
    return TestedRun(name, folder, metrics, images, maps, scores, aupimo, flagged, curves)


def _in_order_of(first: TestedRun, run: TestedRun) -> TestedRun:
    """Return the run with its images in the order of the first, or raise a ValueError if they differ.

    Suffixes of names are ignored, because runs of an older version have none.
    """
    expected, own = (
        [(bare_name(image), *rest) for image, *rest in each.images] for each in (first, run)
    )
    place = {image: i for i, image in enumerate(own)}
    here, there = set(expected), set(own)
    if here != there or len(expected) != len(own):
        example = min(here ^ there, key=str, default=None)
        which = "" if example is None else f", {example[0]} ({example[1]}) is in one of them only"
        raise ValueError(
            f"{run.folder} was tested on other images than {first.folder}: "
            f"{len(there)} against {len(here)}{which}"
        )
    order = [place[image] for image in expected]
    return replace(
        run,
        images=first.images,
        maps=tuple(run.maps[i] for i in order),
        scores=run.scores[order],
        aupimo=run.aupimo[order],
        flagged=None if run.flagged is None else run.flagged[order],
    )
