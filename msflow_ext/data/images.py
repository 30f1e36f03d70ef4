"""Turn the images and masks of a data set into the square tensors that models see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msflow_ext.choices import FITS, Fit
from msflow_ext.data import masks
from msflow_ext.data.dataset import Item
from msflow_ext.data.decoding import load_image
from msflow_ext.data.pictures import Source, decode

if TYPE_CHECKING:
    from PIL import Image


Box = tuple[slice, slice]


class Images(torch.utils.data.Dataset[torch.Tensor]):
    """A PyTorch data set of images as float32 tensors, RGB in 0..1, resized with Lanczos.

    The whole image is seen; nothing is cropped. With ``fit="resize"`` it is stretched to the square.
    With ``fit="pad"`` it keeps its aspect ratio: the longer side has ``size`` pixels, and black fills
    the rest. The border is not repeated, so that no defect appears twice.

    Args:
        items: the images.
        size: side of the square in pixels.
        fit: ``"resize"`` or ``"pad"``.

    Shape:
        - Output: ``(3, size, size)`` for each index.

    Raises:
        ValueError: ``size`` is not a positive integer, or ``fit`` is unknown. On access: a file
            cannot be decoded.

    Examples:
        >>> from msflow_ext.data import Images, Item
        >>> images = Images([Item("a", 0, "good", np.full((20, 30), 255, np.uint8))], size=16)
        >>> images[0].shape, images[0].max().item()
        (torch.Size([3, 16, 16]), 1.0)
    """

    def __init__(self, items: Sequence[Item], size: int, fit: Fit = "resize") -> None:
        self.items = tuple(items)
        self.size = _checked_size(size)
        self.fit: Fit = _checked_fit(fit)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = _fitted(load_image(self.items[index].image), self.size, self.fit)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return levels.to(torch.float32, memory_format=torch.contiguous_format) / 255

    def mask(self, index: int) -> np.ndarray | None:
        """Return the mask of an image, True on the defect, or None if the defect is not marked.

        The mask is resized or padded as its image is. Padding counts as normal.

        Shape:
            - Output: bool ``(size, size)``.

        Raises:
            ValueError: the mask cannot be decoded, or its size differs from that of its image.
        """
        item = self.items[index]
        if item.label == 0:
            return np.zeros((self.size, self.size), dtype=bool)
        if item.label is None or item.mask is None:
            return None
        return load_mask(item.mask, self.size, item.image, self.fit)

    def shown(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return an image and its mask for display, in the aspect ratio of the file.

        The longer side has ``size`` pixels, whatever ``fit`` is.

        Shape:
            - Image: uint8 ``(H, W, 3)``.
            - Mask: bool ``(H, W)``, or None if the defect is not marked.
        """
        image = load_image(self.items[index].image)
        box = placed(*image.size, self.size, "pad")
        picture = resized(np.asarray(image), *in_aspect(image.height, image.width, self.size))
        mask = Images(self.items, self.size, "pad").mask(index)
        return picture, None if mask is None else mask[box]

    def box(self, index: int) -> Box:
        """Return the rows and columns of the square that show the image; the others are padding."""
        image = self.items[index].image
        size = (1, 1) if self.fit == "resize" else decode(image).pixels.size
        return placed(*size, self.size, self.fit)


def load_mask(
    source: Source, size: int, image: Source | None = None, fit: Fit = "resize"
) -> np.ndarray:
    """Decode a mask, and resize it to the nearest pixel without losing a region.

    :func:`msflow_ext.data.masks.decode_mask` describes which pixels are marked. Each region keeps at
    least one pixel, as :func:`msflow_ext.data.masks.resize` describes.

    Args:
        source: a file, a folder of files whose union is the mask, or a bool or integer ``(H, W)``
            array.
        size: side of the square in pixels.
        image: the image of the mask. If given, both must have the same size.
        fit: ``"resize"`` or ``"pad"``, as for :class:`Images`.

    Shape:
        - Output: bool ``(size, size)``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the mask cannot be decoded, or its size differs from that of its image.
        TypeError: an array is neither bool nor integer.

    Examples:
        >>> mask = np.zeros((64, 64), bool)
        >>> mask[10:20, 10:20] = True
        >>> load_mask(mask, size=32).sum().item()
        25
    """
    _checked_size(size)
    _checked_fit(fit)
    mask, square = masks.read_mask(source, image), np.zeros((size, size), bool)
    height, width = mask.shape
    rows, columns = placed(width, height, size, fit)
    extent = rows.stop - rows.start, columns.stop - columns.start
    square[rows, columns], _ = masks.resize(mask, *extent)
    return square


def placed(width: int, height: int, size: int, fit: Fit) -> Box:
    """Return the rows and columns of a square of ``size`` that show a ``width`` x ``height`` image."""
    longer = max(width, height)
    extents = (
        size if fit == "resize" else max(1, round(size * side / longer)) for side in (height, width)
    )
    rows, columns = (
        slice((size - extent) // 2, (size - extent) // 2 + extent) for extent in extents
    )
    return rows, columns


def _fitted(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    from PIL import Image

    rows, columns = placed(*image.size, size, fit)
    extent = columns.stop - columns.start, rows.stop - rows.start
    resized = image.resize(extent, Image.Resampling.LANCZOS)
    if fit == "resize":
        return resized
    square = Image.new(image.mode, (size, size))
    square.paste(resized, (columns.start, rows.start))
    return square


def _checked_size(size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be a positive whole number of pixels, got {size!r}")
    return size


def _checked_fit(fit: Fit) -> Fit:
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    return fit


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image ``(H, W, 3)``, a float anomaly map ``(H, W)`` or a bool mask ``(H, W)``."""
    from PIL import Image

    if values.dtype == np.bool_:
        return masks.resize(values, height, width)[0]
    if values.dtype == np.uint8:
        image = Image.fromarray(values).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(image)
    number = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(number.resize((width, height), Image.Resampling.BILINEAR))


def in_aspect(height: int, width: int, longer: int) -> tuple[int, int]:
    """Return height and width of the same aspect ratio, the longer side being ``longer``."""
    rows, columns = placed(width, height, longer, "pad")
    return rows.stop - rows.start, columns.stop - columns.start


def to_pixels(image: Tensor) -> np.ndarray:
    """Convert ``(3, H, W)``, float in 0..1 or uint8, to uint8 ``(H, W, 3)``."""
    if image.dtype != torch.uint8:
        image = (image * 255).round().clamp(0, 255).byte()
    return image.permute(1, 2, 0).cpu().numpy()
