"""Decode masks: which pixels are marked, and how regions survive resizing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from msflow_ext.data.pictures import Picture, Source, decode, source_name
from msflow_ext.data.walk import walk


@dataclass(frozen=True)
class Mask:
    """A decoded mask.

    Attributes:
        marks: bool ``(H, W)``, True on the defect.
        turned: whether EXIF rotated it.
        soft: whether its outlines were soft, so that it was cut at half of its largest level.
    """

    marks: np.ndarray
    turned: bool = False
    soft: bool = False


def read_mask(source: Source, image: Source | None = None) -> np.ndarray:
    """Decode a mask into bool ``(H, W)``, as :func:`decode_mask` does.

    Args:
        image: the image of the mask. If given, both must have the same size.

    Raises:
        ValueError: the mask cannot be decoded, or its size differs from that of its image.
        TypeError: an array is neither bool nor integer.
    """
    mask = decode_mask(source)
    if image is not None:
        check_size(mask, source, decode(image), image)
    return mask.marks


def decode_mask(source: Source) -> Mask:
    """Decode a mask, whatever its encoding.

    Every level above black is marked. Masks with 0/1, 0/255, class numbers, 16 bits or 1 bit work,
    and so do palettes (by their colors) and colors (by their largest channel). There are two
    exceptions:

    - Soft outlines. A mask is soft if its compression is lossy (JPEG), or if some pixels lie about
      midway between black and the largest level, and no such level fills 3 x 3 pixels, as a class
      would. A soft mask is cut at half of its largest level; regions below half, at a quarter.
    - Alpha. The alpha channel is the mask if it varies and the colors mark all pixels or none.

    Args:
        source: a file, a folder of files whose union is the mask, or a bool or integer ``(H, W)``
            array.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file cannot be decoded, or the files of a folder differ in size.
        TypeError: an array is neither bool nor integer.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _union(Path(source))
    return _of_picture(decode(source))


def check_size(mask: Mask, source: Source, picture: Picture, image: Source) -> None:
    """Raise a ValueError that names both files unless a mask and its image have the same size."""
    (height, width), size = mask.marks.shape, picture.pixels.size
    if (width, height) != size:
        turned = " (rotated by EXIF)" if picture.turned else ""
        raise ValueError(
            f"mask {source_name(source)} must have the size of its image {source_name(image)}, "
            f"{size[0]}x{size[1]} pixels{turned}, got {width}x{height}"
        )


def resize(marks: np.ndarray, height: int, width: int) -> tuple[np.ndarray, int]:
    """Resize to the nearest pixel, as published evaluations do, without losing a region.

    If an 8-connected region has no pixel left, it marks every pixel of the result that it touches.
    So each region keeps at least one pixel, which it may share with another region.

    Returns:
        The mask, bool ``(height, width)``, and the number of regions that had no pixel left.
    """
    from PIL import Image
    from scipy import ndimage

    numbered, count = ndimage.label(marks, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    small = Image.fromarray(numbered.astype(np.int32))
    nearest = np.asarray(small.resize((width, height), Image.Resampling.NEAREST))
    resized = nearest > 0
    lost = np.flatnonzero(np.bincount(nearest.ravel(), minlength=count + 1) == 0)
    lost = lost[lost > 0]
    if lost.size:
        rows, columns = np.nonzero(np.isin(numbered, lost))
        resized[rows * height // marks.shape[0], columns * width // marks.shape[1]] = True
    return resized, lost.size


def _of_array(array: np.ndarray) -> Mask:
    if array.dtype.kind not in "biu":
        raise TypeError(f"a mask array must be bool or integer, got {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"a mask array must be (H, W), got {array.shape}")
    soft = array.dtype in (np.uint8, np.uint16) and _is_soft(array)
    return Mask(_cut(array) if soft else array > 0, soft=soft)


def _union(folder: Path) -> Mask:
    masks = [_of_picture(decode(path)) for path in walk(folder, deep=False).paths]
    if len({mask.marks.shape for mask in masks}) != 1:
        raise ValueError(
            f"mask {folder} must be a folder of images of one size, got {len(masks)} images"
        )
    return reduce(
        lambda a, b: Mask(a.marks | b.marks, a.turned or b.turned, a.soft or b.soft), masks
    )


def _of_picture(picture: Picture) -> Mask:
    image = picture.pixels
    palette = image.mode in ("P", "PA")
    if palette:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I") and image.mode[:4] != "I;16":
        image = image.convert("RGB")
    values = np.asarray(image).reshape(image.height, image.width, -1)
    if image.mode in ("LA", "RGBA"):
        values, alpha = values[..., :-1], values[..., -1]
        blank = not values.any() or values.any(axis=2).all()
        if blank and alpha.min() < alpha.max():
            values = alpha[..., None]
    levels = values.max(axis=2)
    soft = picture.lossy or (not palette and _is_soft(levels))
    return Mask(_cut(levels) if soft else levels > 0, picture.turned, soft)


def _is_soft(levels: np.ndarray) -> bool:
    """Return whether levels between black and the largest belong to outlines, not to classes."""
    from scipy import ndimage

    largest = int(levels.max())
    if levels.dtype.kind != "u" or 2 * largest < np.iinfo(levels.dtype).max:
        return False  # class numbers
    between = (levels > largest / 8) & (levels < largest - largest / 8)
    flat = ndimage.maximum_filter(levels, 3) == ndimage.minimum_filter(levels, 3)
    return bool(between.any() and not (between & flat).any())


def _cut(levels: np.ndarray) -> np.ndarray:
    """Cut a soft mask at half of its largest level, and fainter regions at a quarter."""
    from scipy import ndimage

    largest = int(levels.max())
    core = levels > largest / 2
    numbered, _ = ndimage.label(levels > largest / 4, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    faint = ~np.isin(numbered, np.append(numbered[core], 0))
    return core | faint
