"""The pictures of a page: their order, and their encoding as small data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from msflow_ext.reports.heat_maps import CONTOUR, heat_map, outline

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 2000  # images on a page
BUDGET = 24_000_000  # bytes of all pictures on a page
SIDES = 112, 256  # longer side of a picture in pixels, if there are many and if there are few

#: Image (H, W, 3) uint8, anomaly map (H, W), mask (H, W) bool or None.
Picture: TypeAlias = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]


@dataclass(frozen=True)
class Layers:
    """Data URIs of an image, its heat map, and its mask outline, which is drawn over the image."""

    image: str
    heat: str
    outline: str | None


def worst_first(
    labels: Sequence[int | None], scores: Sequence[float]
) -> tuple[list[int], list[int | None]]:
    """Sort images so that the worst mistakes come first.

    The mistake of a good image is the share of defective images with a lower score. The mistake of
    a defective image is the share of good images with a higher score. Among equal mistakes, the
    image whose rank among all scores is nearer to the other class comes first. Unlabeled images
    come last, the highest score first.

    Returns:
        The sorted indices. And, for each image in the given order, the number of images of the other
        class on the wrong side of it; None where the other class is empty.
    """
    truth = np.array([-1 if label is None else label for label in labels], int)
    values = np.asarray(scores, float)
    ranked_all = np.sort(values)
    others = {label: np.sort(values[truth == 1 - label]) for label in (0, 1)}
    confused: list[int | None] = []
    keys = []
    for score, label in zip(values, truth.tolist(), strict=True):

        def beyond(ranked: np.ndarray, score: float = score, label: int = label) -> int:
            if label == 1:
                return len(ranked) - int(np.searchsorted(ranked, score, side="right"))
            return int(np.searchsorted(ranked, score, side="left"))

        other = others.get(label, ranked_all[:0])
        confused.append(beyond(other) if len(other) else None)
        keys.append((label < 0, -(confused[-1] or 0) / max(len(other), 1), -beyond(ranked_all)))
    return sorted(range(len(keys)), key=keys.__getitem__), confused


def draw_layers(
    pictures: Iterable[Picture], count: int, colours: tuple[float, float]
) -> list[Layers]:
    """Return the layers of ``count`` pictures; more pictures are smaller, to keep within the page's budget."""
    few, many = SIDES[1], SIDES[0]
    side = int(min(few, max(many, few * math.sqrt(200 / max(count, 1)))))
    return [_draw(*each, side, BUDGET // (2 * count), colours) for each in pictures]


def _draw(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None,
    side: int,
    most: int,
    colours: tuple[float, float],
) -> Layers:
    from PIL import Image

    scale = min(1.0, side / max(image.shape[:2]))
    height, width = (max(1, round(scale * extent)) for extent in image.shape[:2])
    box = Image.Resampling.BOX
    small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    values = Image.fromarray(np.asarray(anomaly_map, np.float32)).resize((width, height), box)
    low, high = colours
    heat = heat_map(np.asarray(small), np.asarray(values), low=low, high=high)
    line = None
    if mask is not None and mask.any():
        shares = Image.fromarray(mask.astype(np.float32)).resize((width, height), box)
        line = _line_uri(outline(np.asarray(shares) > 0))  # keeps the thinnest defect
    return Layers(jpeg_uri(small, most), jpeg_uri(heat, most), line)


def jpeg_uri(picture: Image, most: int = BUDGET) -> str:
    """Return a JPEG as a data URI, in the best of four qualities that fits in ``most`` bytes, else the lowest."""
    coded = ""
    for quality in (82, 60, 35, 10):
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=quality)
        coded = base64.b64encode(jpeg.getvalue()).decode()
        if len(coded) <= most:
            break
    return "data:image/jpeg;base64," + coded


def _line_uri(line: np.ndarray) -> str:
    """Return a PNG of an outline as a data URI, transparent elsewhere."""
    from PIL import Image

    drawing = Image.frombytes("P", line.shape[::-1], line.astype(np.uint8).tobytes())
    drawing.putpalette((0, 0, 0, *CONTOUR))
    png = io.BytesIO()
    drawing.save(png, "PNG", bits=1, transparency=0)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
