"""Render self-contained HTML pages: one file each, without network access or third-party scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.files import replacing
from msflow_ext.reports.heat_maps import RAMP

_SHORT = {"auroc": "AUROC", "aupro": "AUPRO", "aupimo": "AUPIMO", "f1": "F1"}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page completely or not at all; see :func:`render_page` for the arguments."""
    html = render_page(template, **values)
    with replacing(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_page(template: str, **values: Any) -> str:
    """Return the HTML of ``templates/template``, filled with ``values``; all values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("msflow_ext.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "percent": percent,
        "plain": plain,
        "duration": duration,
        "name": metric_name,
        "points": points,
        "place": place,
    }
    pages.globals["ramp"] = RAMP
    return pages.get_template(template).render(values)


def metric_name(key: str) -> str:
    """Return the name of a metric for people, such as "Image AUROC" for ``image_auroc``."""
    words = " ".join(
        _SHORT.get(word, word) for word in key.replace("average_precision", "AP").split("_")
    )
    return words[:1].upper() + words[1:]


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, with two decimals."""
    if fraction is None or math.isnan(fraction):
        return "not available"
    return f"{100 * fraction:.2f}%"


def points(difference: float | None) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    if difference is None:
        return ""
    text = f"{100 * difference:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "\u2212")


def score_format(scores: Sequence[float]) -> Callable[[float], str]:
    """Return a formatter of scores, precise to about a hundredth of the range of ``scores``."""
    spread = float(np.ptp(scores)) if len(scores) else 0.0
    decimals = max(3 - math.ceil(math.log10(spread)), 0) if spread > 0 else 3
    if decimals < 7:
        return lambda score: f"{score:.{decimals}f}"
    before = 1 + math.floor(math.log10(float(np.abs(scores).max())))  # digits before the point
    return lambda score: f"{score:.{decimals + before}g}"


def plain(value: Any) -> str:
    """Return a value of a recipe in plain words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def place(value: float | None, colours: tuple[float, float]) -> float | None:
    """Return the position of a map value on the color scale in percent; None for no value."""
    low, high = colours
    return None if value is None else round(100 * min(max((value - low) / (high - low), 0), 1), 1)


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
