"""Decode images of any usual kind at their own size."""

from __future__ import annotations

import logging
from io import BytesIO
from threading import Event
from typing import TYPE_CHECKING

from msflow_ext.data.masks import read_mask
from msflow_ext.data.pictures import Source, decode, decode_file, source_name, to_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["load_bytes", "load_image", "read_mask"]

log = logging.getLogger(__name__)
_said = Event()  # warn once that a file holds several images


def load_image(source: Source) -> Image.Image:
    """Decode a file, a frame of a video or an array into an 8-bit RGB image.

    Gray is repeated, a palette is looked up, an alpha channel is dropped (the colours under it are
    kept), the EXIF orientation is applied, and of several pages or frames the first is taken, which
    is logged once.

    Of 16 bits 65535 is white: gray is divided by 257, of colours the high byte is taken. Values of
    10 or 12 bits in such a file come out dark: scale them before. ``msflow data check`` finds them.

    Args:
        source: a file, a frame, or an array: ``(H, W)`` bool, uint8 or uint16, or ``(H, W, 3)`` or
            ``(H, W, 4)`` uint8 in the order RGB. OpenCV's arrays are BGR: ``array[..., ::-1]``. A
            file is PNG, JPEG, BMP, TIFF or WebP, whatever its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, damaged, of another kind, or so large that Pillow takes
            it for a decompression bomb; a TIFF file of signed, floating point or more than 16 bits,
            of 16 bits in separate planes, or of colours other than gray, RGB, CMYK, YCbCr and
            palettes; an array has another shape.
        TypeError: an array has another dtype.
    """
    picture, name = decode(source), source_name(source)
    if picture.images > 1 and not _said.is_set():
        _said.set()
        text = "%s holds %d images, of which the first is read; other files may, too"
        log.warning(text, name, picture.images)
    return to_rgb(picture, name)


def load_bytes(content: bytes, max_pixels: int) -> Image.Image:
    """Decode the bytes of an untrusted image file, as `load_image` decodes a file.

    Raises:
        ValueError: as `load_image`; or there are more than ``max_pixels`` pixels, which is seen
            before they are decoded.
    """
    return to_rgb(decode_file(BytesIO(content), "the body", max_pixels), "the image")
