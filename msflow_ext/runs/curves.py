"""Curves of a test, stored as a few hundred exact points of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from msflow_ext.files import read_json, write_text

#: False-positive rates, and the rates found at them; both rise.
Curve: TypeAlias = tuple[np.ndarray, np.ndarray]

CURVES = "curves.json"
POINTS = 500  # maximum number of points of a curve


def write_curves(run: Path, curves: Mapping[str, Curve]) -> None:
    """Write ``curves.json`` to a run folder, completely or not at all; without curves, write nothing."""
    few = {name: [part.tolist() for part in thinned(*each)] for name, each in curves.items()}
    if few:
        write_text(run / CURVES, json.dumps(few, allow_nan=False))


def read_curves(run: Path) -> dict[str, Curve]:
    """Return the curves of a run folder, or none without ``curves.json``.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / CURVES
    content = read_json(path) if path.exists() else {}
    return {name: _rising(path, name, values) for name, values in content.items()}


def thinned(xs: np.ndarray, ys: np.ndarray) -> Curve:
    """Return at most 500 points of a rising curve, evenly spaced along it, with both ends."""
    length = (xs - xs[0]) / max(np.ptp(xs), 1e-9) + (ys - ys[0]) / max(np.ptp(ys), 1e-9)
    few = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], POINTS - 1)))
    few = np.unique([0, *np.minimum(few, len(xs) - 1), len(xs) - 1])
    return xs[few], ys[few]


def _rising(path: Path, name: str, values: Any) -> Curve:
    """Return the two rows of a curve, or raise a ValueError if they are not rising rates."""
    try:
        xs, ys = np.array(values, float)
    except (TypeError, ValueError):
        xs = ys = np.empty(0)
    if xs.ndim != 1 or len(xs) < 2 or not all(_are_rates(part) for part in (xs, ys)):
        raise ValueError(f"{path} is damaged: {name} must be two rows of rising rates in 0..1")
    return xs, ys


def _are_rates(values: np.ndarray) -> bool:
    return bool((np.diff(values, prepend=0.0, append=1.0) >= 0).all())
