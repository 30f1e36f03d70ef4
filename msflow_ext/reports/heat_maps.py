"""Draw anomaly maps as colors over images, on one color scale per category."""

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
CONTOUR = (0, 229, 255)  # cyan, far from every color of the ramp
WIDTH = "panel width"  # key of a PNG text; files without it have square panels


def colour_range(
    maps: Iterable[np.ndarray], percentiles: tuple[float, float] = (50.0, 99.8)
) -> tuple[float, float]:
    """Return ``(low, high)``, the common color range of a category's anomaly maps.

    By default the lower half of all pixels has the lowest color, and a few extreme pixels do not
    stretch the range. ``high > low`` holds even if all pixels are equal.

    Args:
        maps: anomaly maps of a category.
        percentiles: percentiles of all pixels that become ``low`` and ``high``.

    Shape:
        maps: any number of ``(H, W)``, float.

    Raises:
        ValueError: there are no pixels, or one is not finite.
    """
    sample, peak = [], -math.inf
    for number, each in enumerate(maps):
        values = np.asarray(each, dtype=np.float64).ravel()
        if not np.isfinite(values).all():
            raise ValueError(f"maps must be finite, got NaN or infinity in map {number}")
        # About 4,096 pixels per map suffice for a percentile. The odd step visits every column.
        sample.append(values[:: values.size // 4096 | 1])
        peak = max(peak, values.max(initial=-math.inf))
    if not sum(map(len, sample)):
        raise ValueError("maps must have at least one pixel, got none")
    low, high = (float(v) for v in np.percentile(np.concatenate(sample), percentiles))
    if high == low:  # almost all pixels are equal
        high = float(peak)
    flat = high - low <= 1e-6 * max(abs(low), abs(high))  # float32 rounding only
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
    """Draw ``anomaly_map`` as colors over ``image``, with the outline of ``mask`` on top.

    Args:
        image: image to draw on.
        anomaly_map: anomaly map of the image.
        low: map value at the dark end of the color ramp; lower values have the same color.
        high: map value at the yellow end of the color ramp; higher values have the same color.
        alpha: opacity from 0 (image only) to 1 (colors only). In between, higher map values are more
            opaque, so that the highest are yellow on any image.
        mask: region to outline; None for no outline.

    Shape:
        image: ``(H, W, 3)``, uint8, RGB.
        anomaly_map: ``(H, W)``, float.
        mask: ``(H, W)``, bool.

    Raises:
        ValueError: shapes differ, a value is not finite, ``low >= high``, or ``alpha`` is outside 0..1.
        TypeError: ``image`` is not uint8.
    """
    _check_image(image)
    values = np.asarray(anomaly_map, dtype=np.float64)
    if values.shape != image.shape[:2]:
        raise ValueError(f"anomaly_map must have shape {image.shape[:2]}, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("anomaly_map must be finite, got NaN or infinity")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be finite with low < high, got {low} and {high}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    level = np.clip((values - low) / (high - low), 0.0, 1.0)
    anchors = np.linspace(0.0, 1.0, len(RAMP))
    colours = np.stack([np.interp(level, anchors, channel) for channel in np.transpose(RAMP)], -1)
    # With alpha 0.5 the lowest values cover 0.35 of the image, the highest 0.97.
    cover = alpha ** (1.5 - 1.45 * level[..., None])
    blend = np.rint((1.0 - cover) * image + cover * colours).astype(np.uint8)
    return mask_contour(blend, np.zeros(values.shape, bool) if mask is None else mask)


def mask_contour(image: np.ndarray, mask: np.ndarray) -> Image:
    """Draw the outline of ``mask`` on a copy of ``image``.

    Shape:
        image: ``(H, W, 3)``, uint8, RGB.
        mask: ``(H, W)``, bool.

    Raises:
        ValueError: shapes differ.
        TypeError: ``image`` is not uint8.
    """
    from PIL import Image

    _check_image(image)
    inside = np.asarray(mask, dtype=bool)
    if inside.shape != image.shape[:2]:
        raise ValueError(f"mask must have shape {image.shape[:2]}, got {inside.shape}")
    return Image.fromarray(np.where(outline(inside)[..., None], np.array(CONTOUR, np.uint8), image))


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the inner edge of a mask ``(H, W)``, bool: one pixel wide, wider for large masks."""
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
    """Write ``out_dir/maps/NAME.png`` for every image: image, heat map and mask outline side by side.

    The last panel is left out where the mask is None. ``scar/006`` becomes ``scar-006.png``. A name
    cannot point outside the folder, and two names never share a file. The iterables may be
    generators; one image is in memory at a time.

    Args:
        out_dir: folder in which to create ``maps/``.
        names, images, maps, masks: one entry per image.
        low, high, alpha: see :func:`heat_map`.

    Returns:
        The paths of the files.

    Raises:
        ValueError: as :func:`heat_map`, or the iterables have different lengths.
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
    """Return the panels of a file of :func:`save_maps`: image, heat map and, if it has one, mask outline.

    Raises:
        ValueError: the picture has other panels.
        OSError: the file is not a PNG, or cannot be read.
    """
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as file:
        strip, known = file.convert("RGB"), str(file.info.get(WIDTH, file.height))
    width = int(known) if known.isdecimal() and int(known) else strip.width
    step = width + _gap(width)
    count, rest = divmod(strip.width + step - width, step)
    if rest or count < 2:
        raise ValueError(
            f"{path} must hold two or three panels, got {strip.width}x{strip.height} pixels"
        )
    return [strip.crop((k * step, 0, k * step + width, strip.height)) for k in range(count)]


def _gap(width: int) -> int:
    return max(2, width // 64)


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape (H, W, 3), got {image.shape}")
