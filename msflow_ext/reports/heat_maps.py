"""Anomaly maps as colour over photographs, on one scale per category."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msflow_ext.files import replacing
from msflow_ext.runs.folder import map_paths

if TYPE_CHECKING:
    from PIL.Image import Image

# Lightness rises evenly from night blue to yellow, so the order survives a gray printer.
RAMP = ((8, 8, 32), (70, 17, 104), (152, 36, 104), (219, 76, 61), (249, 152, 36), (252, 236, 64))
CONTOUR = (0, 229, 255)  # cyan, which the ramp never comes near
WIDTH = "panel width"  # text in a PNG; files without it have square panels


def colour_range(
    maps: Iterable[np.ndarray], percentiles: tuple[float, float] = (50.0, 99.8)
) -> tuple[float, float]:
    """Return ``(low, high)``, the one colour scale of all the anomaly maps of a category.

    The quieter half of all pixels stays at the bottom of the ramp; a few hot pixels do not
    stretch it. ``high > low`` always, also when every pixel is the same.

    Shapes:
        maps: any number of ``(H, W)`` float maps.
    Raises:
        ValueError: there is no pixel, or one is not finite.
    """
    sample, peak = [], -math.inf
    for number, each in enumerate(maps):
        values = np.asarray(each, dtype=np.float64).ravel()
        if not np.isfinite(values).all():
            raise ValueError(f"maps: map {number} holds NaN or infinity, finite numbers are wanted")
        # about 4,096 pixels a map are plenty for a percentile; odd, to visit every column
        sample.append(values[:: values.size // 4096 | 1])
        peak = max(peak, values.max(initial=-math.inf))
    if not sum(map(len, sample)):
        raise ValueError("maps: got no pixels, at least one map is wanted")
    low, high = (float(v) for v in np.percentile(np.concatenate(sample), percentiles))
    if high == low:  # all but a few pixels are the same
        high = float(peak)
    flat = high - low <= 1e-6 * max(abs(low), abs(high))  # nothing but the rounding of float32
    return low, low + max(1.0, abs(low)) if flat else high


def heat_map(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    *,
    low: float,
    high: float,
    alpha: float = 0.5,
    mask: np.ndarray | None = None,
) -> Image:
    """Lay ``anomaly_map`` over ``image`` as colour, and draw the outline of ``mask`` on top.

    ``low`` and below is the dark end of the ramp, ``high`` and above the yellow one. ``alpha`` 0 is
    the image alone, 1 the colours alone. Between them a higher value covers more of the image, so
    that the highest values are yellow on any image.

    Shapes:
        image: ``(H, W, 3)``, uint8, RGB.
        anomaly_map: ``(H, W)``, float.
        mask: ``(H, W)``, bool.
    Raises:
        ValueError: shapes differ, a value is not finite, ``low >= high``, alpha outside 0..1.
        TypeError: image is not uint8.
    """
    _check_image(image)
    values = np.asarray(anomaly_map, dtype=np.float64)
    if values.shape != image.shape[:2]:
        raise ValueError(f"anomaly_map: {image.shape[:2]} is wanted, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("anomaly_map: holds NaN or infinity, finite numbers are wanted")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low, high: finite numbers with low < high are wanted, got {low}, {high}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: a number in 0..1 is wanted, got {alpha}")
    level = np.clip((values - low) / (high - low), 0.0, 1.0)
    anchors = np.linspace(0.0, 1.0, len(RAMP))
    colours = np.stack([np.interp(level, anchors, channel) for channel in np.transpose(RAMP)], -1)
    # With alpha 0.5 the lowest values cover 0.35 of the image, the highest 0.97.
    cover = alpha ** (1.5 - 1.45 * level[..., None])
    blend = np.rint((1.0 - cover) * image + cover * colours).astype(np.uint8)
    return mask_contour(blend, np.zeros(values.shape, bool) if mask is None else mask)


def mask_contour(image: np.ndarray, mask: np.ndarray) -> Image:
    """Draw the outline of ``mask`` on a copy of ``image``.

    Shapes:
        image: ``(H, W, 3)``, uint8, RGB.
        mask: ``(H, W)``, bool.
    Raises:
        ValueError: shapes differ.
        TypeError: image is not uint8.
    """
    from PIL import Image

    _check_image(image)
    inside = np.asarray(mask, dtype=bool)
    if inside.shape != image.shape[:2]:
        raise ValueError(f"mask: {image.shape[:2]} is wanted, got {inside.shape}")
    return Image.fromarray(np.where(outline(inside)[..., None], np.array(CONTOUR, np.uint8), image))


def outline(mask: np.ndarray) -> np.ndarray:
    """The inner edge of a mask ``(H, W)``, bool: one pixel wide, more on large masks."""
    core = mask
    for _ in range(max(1, round(max(mask.shape) / 256))):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~core


def save_maps(
    out_dir: str | Path,
    names: Iterable[str],
    images: Iterable[np.ndarray],
    maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray | None],
    *,
    low: float,
    high: float,
    alpha: float = 0.5,
) -> list[Path]:
    """Write ``out_dir/maps/NAME.png`` for every image: image | heat map | mask outline.

    The last panel is left out where the mask is None. ``scar/006`` becomes ``scar-006.png``; no
    name leads out of the folder, and two names never share a file. All arguments may be
    generators: one image is held at a time.

    Raises:
        ValueError: as ``heat_map``, or the four have different lengths.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    written = []
    for path, image, anomaly_map, mask in zip(
        map_paths(out_dir, names), images, maps, masks, strict=True
    ):
        heat = heat_map(image, anomaly_map, low=low, high=high, alpha=alpha)
        panels = [Image.fromarray(image), heat]
        if mask is not None:
            panels.append(mask_contour(image, mask))
        height, width = image.shape[:2]
        gap = _gap(width)
        strip = Image.new("RGB", (len(panels) * (width + gap) - gap, height), "white")
        for number, panel in enumerate(panels):
            strip.paste(panel, (number * (width + gap), 0))
        about = PngInfo()
        about.add_text(WIDTH, str(width))
        with replacing(path) as temporary:
            strip.save(temporary, "PNG", pnginfo=about)
        written.append(path)
    return written


def read_panels(path: Path) -> list[Image]:
    """The panels of a file that :func:`save_maps` wrote: image, heat map, and perhaps mask outline.

    Raises:
        ValueError: another picture. OSError: none.
    """
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as file:
        strip, known = file.convert("RGB"), str(file.info.get(WIDTH, file.height))
    width = int(known) if known.isdecimal() and int(known) else strip.width
    step = width + _gap(width)
    count, rest = divmod(strip.width + step - width, step)
    if rest or count < 2:
        raise ValueError(f"{path} must hold two or three panels, got {strip.size}")
    return [strip.crop((k * step, 0, k * step + width, strip.height)) for k in range(count)]


def _gap(width: int) -> int:
    return max(2, width // 64)


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image: uint8 is wanted, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: (H, W, 3) is wanted, got {image.shape}")
