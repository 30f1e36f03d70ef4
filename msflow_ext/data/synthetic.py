"""Draw seeded defects on gray photographs, each with the exact mask of the changed pixels.

A kind of defect is a function of an image, uint8 ``(H, W)``, and a random generator; it returns
the changed copy and its bool ``(H, W)`` mask. Sizes grow with the image's shorter side. A random
defect may be too faint to see, so `draw` repeats until one is visible.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Defect = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

MIN_PIXELS = 30
MIN_CHANGE = 8.0  # gray levels of 255, mean over the mask


def draw(
    defect: Defect, image: np.ndarray, rng: np.random.Generator, *, tries: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``defect`` until it has at least 30 pixels that change by 8 gray levels on average.

    Raises:
        ValueError: ``image`` is not ``(H, W)``, or none of the tries gave a visible defect.
        TypeError: ``image`` is not uint8.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 2:
        raise ValueError(f"image must have shape (H, W), got {image.shape}")
    for _ in range(tries):
        changed, mask = defect(image, rng)
        change = np.abs(changed[mask].astype(float) - image[mask])
        if change.size >= MIN_PIXELS and change.mean() >= MIN_CHANGE:
            return changed, mask
    raise ValueError(
        f"{tries} draws gave no visible defect: the image {image.shape} is too small or too flat"
    )


def scar(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste a thin strip of the image elsewhere, rotated, and darker or brighter."""
    side = min(image.shape)
    length, width = rng.uniform(0.15, 0.4) * side, rng.uniform(0.015, 0.045) * side
    return _cut_paste(image, rng, length, width, _dark_or_bright(rng, 0.15, 0.45))


def patch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste a rectangle of the image elsewhere, rotated, at almost the same brightness."""
    length, width = rng.uniform(0.08, 0.19, size=2) * min(image.shape)
    return _cut_paste(image, rng, length, width, rng.uniform(0.95, 1.05))


def blur(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blur a spot. The mask leaves out flat pixels, which blurring does not change visibly."""
    side = min(image.shape)
    blurred = _smooth(image, rng.uniform(0.025, 0.04) * side)
    visible = _smooth(np.abs(blurred - image), 0.01 * side) >= 5
    return _change(image, _spot(image, rng, rng.uniform(0.08, 0.14) * side) & visible, blurred)


def blob(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stain: a darker or brighter spot with a wavy outline."""
    spot = _spot(image, rng, rng.uniform(0.045, 0.12) * min(image.shape))
    return _change(image, spot, image * _dark_or_bright(rng, 0.3, 0.5))


def perlin(
    image: np.ndarray, rng: np.random.Generator, foreign: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw flecks of another texture, ``foreign`` of the image's shape, cut out by Perlin noise."""
    side = min(image.shape)
    rows, columns = _offsets(image, rng)
    near = np.exp(-(rows**2 + columns**2) / (2 * (0.12 * side) ** 2))
    height = near * (1 + _perlin_noise(image.shape, rng.uniform(0.08, 0.16) * side, rng))
    flecks = height > np.quantile(height, 1 - rng.uniform(0.005, 0.03))
    flecks = _smooth(flecks, 0.01 * side) > 0.5  # removes single pixels
    opacity = rng.uniform(0.6, 1.0)
    return _change(image, flecks, opacity * foreign + (1 - opacity) * image)


def _change(
    image: np.ndarray, region: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Replace ``region``; a pixel that would keep its level moves by one, so the mask is exact."""
    levels = np.clip(np.rint(new), 0, 255).astype(np.uint8)
    levels = np.where(levels == image, np.where(image < 128, image + 1, image - 1), levels)
    return np.where(region, levels, image), region


def _cut_paste(
    image: np.ndarray, rng: np.random.Generator, length: float, width: float, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = _offsets(image, rng)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    across = np.cos(angle) * rows - np.sin(angle) * columns
    region = (np.abs(along) < length / 2) & (np.abs(across) < width / 2)

    height, breadth = image.shape
    row = rng.uniform(width / 2, height - width / 2)
    column = rng.uniform(length / 2, breadth - length / 2)
    source_rows = np.clip(row + across, 0, height - 1).astype(int)
    source_columns = np.clip(column + along, 0, breadth - 1).astype(int)
    return _change(image, region, factor * image[source_rows, source_columns])


def _dark_or_bright(rng: np.random.Generator, least: float, most: float) -> float:
    """Draw a factor of brightness that differs from 1 by ``least`` to ``most``."""
    return 1 + rng.choice((-1, 1)) * rng.uniform(least, most)


def _offsets(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's row and column relative to a random point away from the border."""
    row, column = rng.uniform(0.1, 0.9, size=2) * image.shape
    rows, columns = np.indices(image.shape)
    return rows - row, columns - column


def _spot(image: np.ndarray, rng: np.random.Generator, radius: float) -> np.ndarray:
    """Return a disc whose radius varies by up to a third along its outline."""
    rows, columns = _offsets(image, rng)
    angle, waves = np.arctan2(rows, columns), rng.integers(2, 6)
    outline = 1 + rng.uniform(0, 0.33) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(rows, columns) < radius * outline


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth with a Gaussian whose weights are normalized at the border."""
    down, across = (
        np.exp(-0.5 * (np.subtract.outer(np.arange(n), np.arange(n)) / sigma) ** 2)
        for n in image.shape
    )
    down, across = (weights / weights.sum(axis=1, keepdims=True) for weights in (down, across))
    return down @ image @ across.T


def _perlin_noise(shape: tuple[int, ...], cell: float, rng: np.random.Generator) -> np.ndarray:
    """Return gradient noise, about -0.7..0.7, with one random direction per lattice point."""
    rows, columns = (np.arange(n) / cell for n in shape)
    top, left = np.ix_(rows.astype(int), columns.astype(int))
    down, right = np.ix_(rows % 1, columns % 1)
    direction = rng.uniform(0, 2 * np.pi, size=(top.max() + 2, left.max() + 2))

    def corner(i: int, j: int) -> np.ndarray:
        angle = direction[top + i, left + j]
        return np.sin(angle) * (down - i) + np.cos(angle) * (right - j)

    fade_down, fade_right = (t**3 * (t * (6 * t - 15) + 10) for t in (down, right))
    upper = corner(0, 0) + fade_right * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + fade_right * (corner(1, 1) - corner(1, 0))
    return upper + fade_down * (lower - upper)
