"""Pages of one HTML file each, which needs nothing else: no network, no other file, no script of others."""

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
    """Write a page whole or not at all; arguments as :func:`render_page`."""
    html = render_page(template, **values)
    with replacing(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_page(template: str, **values: Any) -> str:
    """The HTML of ``pages/template`` filled with ``values``, all of them escaped."""
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
    """``image_auroc`` as "Image AUROC"; a key that holds no word of ours only loses underscores."""
    words = " ".join(
        _SHORT.get(word, word) for word in key.replace("average_precision", "AP").split("_")
    )
    return words[:1].upper() + words[1:]


def percent(fraction: float | None) -> str:
    """A fraction for a table, in percent."""
    if fraction is None or math.isnan(fraction):
        return "not available"
    return f"{100 * fraction:.2f}%"


def points(difference: float | None) -> str:
    """A difference of fractions, in percentage points with its sign."""
    if difference is None:
        return ""
    text = f"{100 * difference:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "\u2212")


def score_format(scores: Sequence[float]) -> Callable[[float], str]:
    """Return how to write a score, with digits that tell scores a hundredth of the spread of ``scores`` apart."""
    spread = float(np.ptp(scores)) if len(scores) else 0.0
    decimals = max(3 - math.ceil(math.log10(spread)), 0) if spread > 0 else 3
    if decimals < 7:
        return lambda score: f"{score:.{decimals}f}"
    before = 1 + math.floor(math.log10(float(np.abs(scores).max())))  # digits before the point
    return lambda score: f"{score:.{decimals + before}g}"


def plain(value: Any) -> str:
    """A value of the recipe as a reader would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def place(value: float | None, colours: tuple[float, float]) -> float | None:
    """Where a value of a map lies on the colour scale, in percent of its length; None for none."""
    low, high = colours
    return None if value is None else round(100 * min(max((value - low) / (high - low), 0), 1), 1)


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
