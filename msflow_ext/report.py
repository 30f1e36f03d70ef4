"""Heat maps, score tables and the one-file HTML report of a run."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msflow_ext import _charts
from msflow_ext._heat_maps import RAMP, colour_range, heat_map, mask_contour, save_maps
from msflow_ext.checkpoint import replacing
from msflow_ext.metrics import auroc

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Run",
    "colour_range",
    "heat_map",
    "mask_contour",
    "save_maps",
    "write_report",
    "write_scores",
]


def write_scores(
    path: str | Path,
    rows: Iterable[
        tuple[str, str, int | None, float] | tuple[str, str, int | None, float, float | None]
    ],
) -> None:
    """Write ``name,defect,label,score`` lines as CSV, whole or not at all; label None is empty.

    A column ``p_value`` follows if the first row has one.

    Raises:
        ValueError: a score is not finite.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = list(rows)
    rare = ["p_value"] if rows and rows[0][4:] not in ((), (None,)) else []
    table.writerow(("name", "defect", "label", "score", *rare))
    for name, defect, label, score, *p_value in rows:
        if not math.isfinite(score):
            raise ValueError(f"rows: the score of {name!r} is {score}, a finite number is wanted")
        table.writerow(
            (name, defect, "" if label is None else int(label), float(score), *p_value[: len(rare)])
        )
    content = text.getvalue().encode("utf-8", "surrogateescape")  # names need not be valid Unicode
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a report tells about one training and its test; metrics are fractions, None: unknown.

    ``names``, ``defects``, ``labels`` (0 good, 1 defective, None unknown), ``scores`` and, when not
    empty, ``thumbnails`` have one entry per test image. A thumbnail is (image, heat map) or
    (image, heat map, mask outline) in PIL images of one size; any sequence will do, and only the
    entries that the gallery shows are asked for.
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
    baseline: Mapping[str, float | None] | None = None
    baseline_name: str = "Gaussian baseline"
    losses: Sequence[float] = ()  # one per epoch, nats per dimension
    thumbnails: Sequence[tuple[Image, ...]] = ()
    colours: tuple[float, float] | None = None  # the (low, high) of the heat maps
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: str | Path, run: Run) -> None:
    """Write ``run`` as one HTML file that needs nothing else: no network, no other file.

    The gallery shows at most 60 images, the worst mistakes first, and says when it is cut.

    Raises:
        ValueError: the sequences of ``run`` have different lengths, or a score is not finite.
    """
    from jinja2 import Environment, StrictUndefined

    _check_run(run)
    labels, scores = np.array(run.labels, dtype=object), np.asarray(run.scores, dtype=float)
    good, defective = scores[labels == 0], scores[labels == 1]
    gallery = _gallery(run, good, defective) if len(run.thumbnails) else []
    charts = [
        _charts.histogram(good, defective, run.scores),
        _charts.roc(good, defective),
        _charts.loss(run.losses),
    ]
    pages = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {
        "percent": _percent,
        "plain": _plain,
        "duration": _duration,
        "name": _name,
        "score": _scale(run.scores),
    }
    template = pages.from_string(files("msflow_ext").joinpath("report.html").read_text("utf-8"))
    html = template.render(
        run=run,
        counts={
            "good": len(good),
            "defective": len(defective),
            "unlabelled": len(run.names) - len(good) - len(defective),
        },
        charts=charts,
        kinds=_kinds(run, good),
        gallery=gallery,
        shown=sum(len(cards) for _, cards in gallery),
        layers=max((len(card["layers"]) for _, cards in gallery for card in cards), default=0),
        ramp=RAMP,
        words=("image", "heat map", "mask"),
    )
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def _check_run(run: Run) -> None:
    for name in ("defects", "labels", "scores") + ("thumbnails",) * bool(len(run.thumbnails)):
        if len(getattr(run, name)) != len(run.names):
            raise ValueError(
                f"run: {name} has {len(getattr(run, name))} entries for {len(run.names)} names"
            )
    for name, score, label in zip(run.names, run.scores, run.labels, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"run: the score of {name!r} is {score}, a finite number is wanted")
        if label not in (0, 1, None):
            raise ValueError(f"run: the label of {name!r} is {label!r}, 0, 1 or None is wanted")


def _kinds(run: Run, good: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the per-defect table: the good images, then the defect hardest to find first."""
    groups: dict[tuple[int, str], list[float]] = {}
    for defect, label, score in zip(run.defects, run.labels, run.scores, strict=True):
        group = (2, "unlabelled") if label is None else (label, defect if label else "good")
        groups.setdefault(group, []).append(float(score))
    rows = []
    for (label, name), scores in groups.items():
        found = None
        if label == 1 and len(good):
            found = auroc([0] * len(good) + [1] * len(scores), [*good, *scores])
        rows.append(
            {
                "label": label,
                "name": name,
                "count": len(scores),
                "mean": float(np.mean(scores)),
                "auroc": found,
                "strip": _charts.strip(scores, run.scores),
            }
        )
    return sorted(rows, key=lambda r: (r["label"], r["auroc"] or 0.0, r["name"]))


def _gallery(run: Run, good: np.ndarray, defective: np.ndarray) -> list[tuple[str, list[dict]]]:
    """The sections of the gallery, 60 cards at most, each section with its worst mistake first."""
    rising = [int(i) for i in np.argsort(np.asarray(run.scores, float), kind="stable")]
    falling = rising[::-1]
    missed = [i for i in rising if run.labels[i] == 1]
    sections = [
        ("Good images, highest scores first", [i for i in falling if run.labels[i] == 0][:24]),
        ("Defective images, lowest scores first", missed[:24]),
        ("Defective images, highest scores first", missed[24:][::-1][:12]),
    ]
    free = 60 - sum(len(chosen) for _, chosen in sections)
    unknown = [i for i in falling if run.labels[i] is None][:free]
    sections.append(("Unlabelled images, highest scores first", unknown))

    def card(i: int) -> dict[str, Any]:
        score, label = float(run.scores[i]), run.labels[i]
        wrong, verdict = 0, ""
        if label == 0 and len(defective):
            wrong = int((defective < score).sum())
            verdict = f"above {wrong or 'none'} of {len(defective)} defective"
        if label == 1 and len(good):
            wrong = int((good > score).sum())
            verdict = f"below {wrong or 'none'} of {len(good)} good"
        return {
            "name": run.names[i],
            "kind": "unlabelled" if label is None else run.defects[i],
            "score": score,
            "mistake": wrong > 0,
            "verdict": verdict,
            "layers": [_data_uri(layer) for layer in run.thumbnails[i]],
        }

    return [(title, [card(i) for i in chosen]) for title, chosen in sections if chosen]


def _data_uri(picture: Image, side: int = 256) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def _name(key: str) -> str:
    """``image_auroc`` as "Image AUROC"; a key that holds no word of ours only loses underscores."""
    short = {"auroc": "AUROC", "aupro": "AUPRO", "ap": "AP", "f1": "F1", "pro": "PRO"}
    words = " ".join(short.get(word, word) for word in key.split("_"))
    return words[:1].upper() + words[1:]


def _scale(scores: Sequence[float]) -> Callable[[float], str]:
    """How to write a score, with digits that fit the spread of ``scores``."""
    spread = float(np.ptp(scores)) if len(scores) else 0.0
    digits = 3 - math.ceil(math.log10(spread)) if spread > 0 else 3
    return lambda score: f"{score:.{max(digits, 0)}f}" if digits < 7 else f"{score:.4g}"


def _percent(fraction: float | None) -> str:
    if fraction is None or math.isnan(fraction):
        return "not available"
    return f"{100 * fraction:.2f}%"


def _plain(value: Any) -> str:
    """A value of the recipe as a reader would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
