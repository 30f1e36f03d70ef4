"""Cut large images into overlapping square tiles, and join the tiles' maps without seams."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[slice, slice]


def pixels_of(overlap: float, side: int) -> int:
    """Return the share ``overlap`` of a tile's side in whole pixels; raise ValueError unless 0 <= overlap < 1."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    return int(overlap * side)


def padded(image: Tensor, side: int) -> tuple[Tensor, Box]:
    """Return an image ``(3, H, W)`` padded with black to at least a tile's side, and its place in the result."""
    height, width = image.shape[1:]
    high, wide = max(0, side - height), max(0, side - width)
    top, left = high // 2, wide // 2
    box = slice(top, top + height), slice(left, left + width)
    return F.pad(image, (left, wide - left, top, high - top)), box


def grid(height: int, width: int, side: int, overlap: int) -> list[Box]:
    """Return rows and columns of evenly spread tiles that cover an image, starting at the top left.

    Args:
        height, width: size of the image in pixels, at least ``side``.
        side: side of a tile in pixels.
        overlap: minimum overlap of neighboring tiles in pixels, 0 <= overlap < side.

    Raises:
        ValueError: ``side`` is larger than the image, or ``overlap`` is out of range.
    """
    if not 0 < side <= min(height, width):
        raise ValueError(f"side must be 1 to {min(height, width)} pixels, got {side}")
    if not 0 <= overlap < side:
        raise ValueError(f"overlap must be at least 0 and below {side} pixels, got {overlap}")
    rows, columns = (_starts(length, side, overlap) for length in (height, width))
    return [(slice(y, y + side), slice(x, x + side)) for y in rows for x in columns]


def stitch(tiles: Iterable[tuple[Box, np.ndarray]], height: int, width: int) -> np.ndarray:
    """Join the maps of tiles into one map ``(height, width)``, float32.

    Where tiles overlap, the result is their mean, weighted by the distance from each tile's border.
    The mean is a running mean, so that equal maps are joined without rounding.

    Args:
        tiles: place and map ``(side, side)`` of each tile; together they cover the result.
        height, width: size of the result in pixels.
    """
    mean, weight = (np.zeros((height, width), np.float32) for _ in range(2))
    for box, tile in tiles:
        rising = np.minimum(np.arange(1, len(tile) + 1), np.arange(len(tile), 0, -1))
        share = np.outer(rising, rising).astype(np.float32)
        weight[box] += share
        mean[box] += (tile - mean[box]) * (share / weight[box])
    return mean


def cut(image: Tensor, box: Box) -> Tensor:
    """Return a tile of an image ``(3, H, W)`` as float32 in 0..1; a uint8 image is scaled by 1/255."""
    tile = image[:, box[0], box[1]]
    return tile.to(torch.float32) / 255 if tile.dtype == torch.uint8 else tile.float()


def _starts(length: int, side: int, overlap: int) -> list[int]:
    steps = -(-(length - side) // (side - overlap))
    return [(length - side) * i // max(steps, 1) for i in range(steps + 1)]
