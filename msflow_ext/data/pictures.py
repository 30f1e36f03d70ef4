"""Pixels and facts of a file, a video frame or an array, in their original mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from msflow_ext.data import tiff, video
from msflow_ext.data.dataset import Frame

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # those of SUFFIXES; others start programs
Source = str | Path | Frame | np.ndarray


@dataclass(frozen=True)
class Picture:
    """What a source holds.

    Attributes:
        pixels: in their own mode, turned as EXIF says.
        images: how many the file holds; the first is ``pixels``.
        turned: whether EXIF turned it.
        deep: whether a colour has 16 bits.
        lossy: whether it was compressed with losses, as far as is known.
    """

    pixels: Image.Image
    images: int = 1
    turned: bool = False
    deep: bool = False
    lossy: bool = False


def decode(source: Source) -> Picture:
    """Read all pixels of a source in its own mode; raises as :func:`msflow_ext.data.load_image`."""
    if isinstance(source, Frame):
        source = video.load_frame(source)
    return _of_array(source) if isinstance(source, np.ndarray) else _of_file(Path(source))


def source_name(source: Source) -> str:
    """Return a name of a source for messages."""
    if isinstance(source, np.memmap):
        return str(source.filename)
    return "an array" if isinstance(source, np.ndarray) else str(source)


def to_rgb(picture: Picture, name: str) -> Image.Image:
    """Convert pixels of any mode to 8-bit RGB, as :func:`msflow_ext.data.load_image` says."""
    from PIL import Image

    image = picture.pixels
    if image.mode[:4] == "I;16" or image.mode == "I":  # of 16 bits, too; others are refused
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode in ("P", "PA"):  # straight to RGB, Pillow would warn about transparency
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has colours that cannot be shown as RGB: {error}") from error


def _of_file(path: Path) -> Picture:
    if not path.is_file():
        pattern = "; patterns are not expanded" if set("*?[") & set(str(path)) else ""
        raise FileNotFoundError(f"{path} is not a file{pattern}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        return decode_file(file, str(path))


def decode_file(file: BinaryIO, name: str, max_pixels: int | None = None) -> Picture:
    """As :func:`decode`, of an open file; ValueError before more pixels than that are decoded."""
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
            # Counting the pages of an untrusted file may take long.
            images = 1 if max_pixels is not None else getattr(image, "n_frames", 1)
            deep = ";16" in str(image.tile)  # as Pillow calls what it unpacks
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            lossy = _is_lossy(image.format, start, tags)
            image.load()
            pixels = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of the kinds {', '.join(KINDS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    return Picture(pixels, images, turned, deep, lossy)


def _is_lossy(kind: str | None, start: bytes, tags: tiff.Tags | None) -> bool:
    if kind == "WEBP":
        return b"VP8L" not in start  # the name of its lossless form
    return kind in ("JPEG", "MPO") or (tags is not None and tiff.is_lossy(tags))


def _of_array(array: np.ndarray) -> Picture:
    from PIL import Image

    if array.dtype not in (np.bool_, np.uint8, np.uint16):
        raise TypeError(
            f"an image array must be bool, uint8 or uint16, got {array.dtype}; "
            "of floats in 0..1 give (255 * array).round().astype(numpy.uint8)"
        )
    colours = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if array.size == 0 or not (array.ndim == 2 or colours):
        expected = "(H, W), or (H, W, 3) or (H, W, 4) of uint8"
        raise ValueError(f"an image array must be {expected}, got {array.shape} of {array.dtype}")
    deep = array.dtype == np.uint16
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return Picture(Image.fromarray(np.ascontiguousarray(array)), deep=deep)
