"""Cut large images into overlapping squares, and join their maps without seams."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[slice, slice]


def pixels_of(overlap: float, side: int) -> int:
    """The share ``overlap`` of a tile's side, in whole pixels; ValueError outside 0 <= overlap < 1."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    return int(overlap * side)


def padded(image: Tensor, side: int) -> tuple[Tensor, Box]:
    """An image ``(3, H, W)`` with black around it where it is smaller than a tile, and where it lies there."""
    height, width = image.shape[1:]
    high, wide = max(0, side - height), max(0, side - width)
    top, left = high // 2, wide // 2
    box = slice(top, top + height), slice(left, left + width)
    return F.pad(image, (left, wide - left, top, high - top)), box


def grid(height: int, width: int, side: int, overlap: int) -> list[Box]:
    """Rows and columns of the tiles that cover an image, evenly spread, from its top left on.

    Args:
        height, width: of the image, each at least ``side``, in pixels, as all here.
        side: of a tile.
        overlap: of neighbours, at least.

    Raises:
        ValueError: a tile is larger than the image, or the overlap is not in 0 <= overlap < side.
    """
    if not 0 < side <= min(height, width):
        raise ValueError(f"side must be 1 to {min(height, width)} pixels, got {side}")
    if not 0 <= overlap < side:
        raise ValueError(f"overlap must be at least 0 and below {side} pixels, got {overlap}")
    rows, columns = (_starts(length, side, overlap) for length in (height, width))
    return [(slice(y, y + side), slice(x, x + side)) for y in rows for x in columns]


def stitch(tiles: Iterable[tuple[Box, np.ndarray]], height: int, width: int) -> np.ndarray:
    """Join square maps into one ``(height, width)``, float32.

    Where tiles overlap, the result is their mean, weighted by the distance from each tile's border.
    It is taken as a running mean, so tiles that agree are repeated bit by bit.

    Args:
        tiles: every box with its map ``(side, side)``, one at a time; together they cover the whole.
    """
    mean, weight = (np.zeros((height, width), np.float32) for _ in range(2))
    for box, tile in tiles:
        rising = np.minimum(np.arange(1, len(tile) + 1), np.arange(len(tile), 0, -1))
        share = np.outer(rising, rising).astype(np.float32)
        weight[box] += share
        mean[box] += (tile - mean[box]) * (share / weight[box])
    return mean


def cut(image: Tensor, box: Box) -> Tensor:
    """A tile ``(3, side, side)`` of an image ``(3, H, W)``: float32 in 0..1, also of a uint8 image."""
    tile = image[:, box[0], box[1]]
    return tile.to(torch.float32) / 255 if tile.dtype == torch.uint8 else tile.float()


def _starts(length: int, side: int, overlap: int) -> list[int]:
    steps = -(-(length - side) // (side - overlap))
    return [(length - side) * i // max(steps, 1) for i in range(steps + 1)]
