"""Decode a file, a frame of a video or an array into its pixels, without converting their mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from msflow_ext.data import tiff, video
from msflow_ext.data.dataset import Frame

if TYPE_CHECKING:
    from PIL import Image

KINDS = (
    "PNG",
    "JPEG",
    "BMP",
    "TIFF",
    "WEBP",
)  # those of SUFFIXES; for others Pillow may start programs
Source = str | Path | Frame | np.ndarray


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        pixels: the image in the mode of the file, with the EXIF orientation applied.
        images: number of images in the file, of which ``pixels`` is the first.
        turned: whether EXIF rotated it.
        deep: whether a channel has 16 bits.
        lossy: whether its compression is known to be lossy.
    """

    pixels: Image.Image
    images: int = 1
    turned: bool = False
    deep: bool = False
    lossy: bool = False


def decode(source: Source) -> Picture:
    """Decode a source without converting its mode. Raises as :func:`msflow_ext.data.load_image`."""
    if isinstance(source, Frame):
        source = video.load_frame(source)
    return _of_array(source) if isinstance(source, np.ndarray) else _of_file(Path(source))


def source_name(source: Source) -> str:
    """Return the name of a source for a message."""
    if isinstance(source, np.memmap):
        return str(source.filename)
    return "an array" if isinstance(source, np.ndarray) else str(source)


def to_rgb(picture: Picture, name: str) -> Image.Image:
    """Convert pixels of any mode to 8-bit RGB, as :func:`msflow_ext.data.load_image` describes."""
    from PIL import Image

    image = picture.pixels
    if (
        image.mode[:4] == "I;16" or image.mode == "I"
    ):  # mode I is 16-bit too: other files are refused
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode in (
        "P",
        "PA",
    ):  # Pillow warns about transparency when it converts to RGB directly
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted to RGB: {error}") from error


def _of_file(path: Path) -> Picture:
    if not path.is_file():
        pattern = "; patterns are not expanded" if set("*?[") & set(str(path)) else ""
        raise FileNotFoundError(f"{path} is not a file{pattern}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        return decode_file(file, str(path))


def decode_file(file: BinaryIO, name: str, max_pixels: int | None = None) -> Picture:
    """Decode an open file, after a check that it has at most ``max_pixels`` pixels."""
    from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

    tags = tiff.read_tags(file)
    if tags is not None:
        tiff.refuse_misread(tags, name)
    file.seek(0)
    start = file.read(64)
    try:
        with Image.open(file, formats=KINDS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {max_pixels}")
            # Counting the pages of a file from the network may take long.
            images = 1 if max_pixels is not None else getattr(image, "n_frames", 1)
            deep = ";16" in str(image.tile)  # how Pillow names 16-bit raw modes
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            lossy = _is_lossy(image.format, start, tags)
            image.load()
            pixels = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of the formats {', '.join(KINDS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    return Picture(pixels, images, turned, deep, lossy)


def _is_lossy(kind: str | None, start: bytes, tags: tiff.Tags | None) -> bool:
    if kind == "WEBP":
        return b"VP8L" not in start  # the chunk of lossless WebP
    return kind in ("JPEG", "MPO") or (tags is not None and tiff.is_lossy(tags))


def _of_array(array: np.ndarray) -> Picture:
    from PIL import Image

    if array.dtype not in (np.bool_, np.uint8, np.uint16):
        raise TypeError(
            f"an image array must be bool, uint8 or uint16, got {array.dtype}. "
            "Convert floats in 0..1 with (255 * array).round().astype(numpy.uint8)."
        )
    colors = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if array.size == 0 or not (array.ndim == 2 or colors):
        expected = "(H, W), or (H, W, 3) or (H, W, 4) of uint8"
        raise ValueError(
            f"an image array must have shape {expected}, got {array.shape} of {array.dtype}"
        )
    deep = array.dtype == np.uint16
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return Picture(Image.fromarray(np.ascontiguousarray(array)), deep=deep)
