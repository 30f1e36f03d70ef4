"""Finished runs read back from their folders, all on the same test images in the same order."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.files import read_json, replacing
from msflow_ext.runs.curves import Curve, read_curves
from msflow_ext.runs.folder import METRICS, map_paths

SETTINGS = ("model", "recipe", "data", "versions")


@dataclass(frozen=True)
class TestedRun:
    """A finished run as its folder tells it; ``scores`` and ``aupimo`` (NaN: none) are ``(N,)``."""

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    images: tuple[tuple[str, str, int | None], ...]  # name, kind of defect, label
    maps: tuple[Path, ...]
    scores: np.ndarray
    aupimo: np.ndarray
    curves: Mapping[str, Curve]

    @property
    def flagged(self) -> np.ndarray | None:
        """Which images exceed the run's threshold, ``(N,)`` bool; None without one."""
        threshold = (self.metrics.get("decisions") or {}).get("threshold")
        return None if threshold is None else self.scores > threshold


def read_runs(folders: Sequence[str | Path]) -> list[TestedRun]:
    """Read finished runs that were tested on the same images, in the order of the first.

    Raises:
        FileNotFoundError: a folder is not a finished run.
        ValueError: fewer than two runs or one twice, a damaged file, other test images.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        given = ", ".join(map(str, paths))
        raise ValueError(f"two different runs or more are wanted to compare, got {given}")
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
    images, scores, aupimo = [], [], []
    try:
        with open(
            folder / "scores.csv", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            for row in csv.DictReader(file, strict=True):
                label = int(row["label"]) if row["label"] else None
                images.append((row["name"], row["defect"], label))
                scores.append(float(row["score"]))
                aupimo.append(float(row.get("aupimo") or "nan"))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{folder / 'scores.csv'} is damaged: {error!r}") from None
    if not images:
        raise ValueError(f"{folder / 'scores.csv'} is damaged: it lists no image")
    if not np.isfinite(scores).all():
        raise ValueError(f"{folder / 'scores.csv'} is damaged: a score is not finite")
    maps = tuple(map_paths(folder, (image for image, *_ in images)))
    columns = np.array(scores), np.array(aupimo)
    return TestedRun(name, folder, metrics, tuple(images), maps, *columns, read_curves(folder))


def _in_order_of(first: TestedRun, run: TestedRun) -> TestedRun:
    """The run with its images in the order of the first; ValueError if they are others."""
    place = {image: i for i, image in enumerate(run.images)}
    here, there = set(first.images), set(run.images)
    if here != there or len(first.images) != len(run.images):
        example = min(here ^ there, key=str, default=None)
        which = "" if example is None else f", {example[0]} ({example[1]}) is in one of them only"
        raise ValueError(
            f"{run.folder} was tested on other images than {first.folder}: "
            f"{len(there)} against {len(here)}{which}"
        )
    order = [place[image] for image in first.images]
    return replace(
        run,
        images=first.images,
        maps=tuple(run.maps[i] for i in order),
        scores=run.scores[order],
        aupimo=run.aupimo[order],
    )


def write_scores(
    path: str | Path,
    rows: Iterable[tuple[str, str, int | None, float]],
    **columns: Sequence[float | None] | np.ndarray | None,
) -> None:
    """Write ``name,defect,label,score`` lines as CSV, whole or not at all; label None is empty.

    Args:
        columns: further numbers by their name, one per row, None and NaN for none; None for no such column.

    Raises:
        ValueError: a score is not finite.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    given = {name: values for name, values in columns.items() if values is not None}
    table.writerow(("name", "defect", "label", "score", *given))
    for number, (name, defect, label, score) in enumerate(rows):
        if not math.isfinite(score):
            raise ValueError(f"rows: the score of {name!r} must be finite, got {score}")
        more = (values[number] for values in given.values())
        cells = ("" if v is None or math.isnan(v) else float(v) for v in more)
        table.writerow((name, defect, "" if label is None else int(label), float(score), *cells))
    content = text.getvalue().encode("utf-8", "surrogateescape")  # names need not be valid Unicode
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)
