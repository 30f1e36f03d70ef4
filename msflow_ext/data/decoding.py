"""Decode images and masks of all common formats, without resizing them."""

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
_logged = Event()  # set once a file with several images was logged


def load_image(source: Source) -> Image.Image:
    """Decode a file, a frame of a video or an array into an 8-bit RGB image.

    - Gray is repeated, and a palette is looked up.
    - An alpha channel is dropped; the colors under it are kept.
    - The EXIF orientation is applied.
    - The first of several pages or frames is read, which is logged once.
    - In 16-bit files 65535 is white: gray is divided by 257, and colors keep their high byte. Values
      of 10 or 12 bits come out dark, so scale them first. ``msflow data check`` finds such files.

    Args:
        source: a file, a frame or an array. A file is PNG, JPEG, BMP, TIFF or WebP, whatever its
            suffix. An array is bool, uint8 or uint16 ``(H, W)``, or uint8 ``(H, W, 3)`` or
            ``(H, W, 4)`` in RGB order. Arrays from OpenCV are BGR: pass ``array[..., ::-1]``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, truncated, damaged or of another format, or Pillow refuses it
            as a decompression bomb; the encoding of a TIFF file is not supported; or an array has
            another shape.
        TypeError: an array has another dtype.

    Examples:
        >>> import numpy as np
        >>> image = load_image(np.full((4, 6), 65535, np.uint16))
        >>> image.size, image.mode, image.getpixel((0, 0))
        ((6, 4), 'RGB', (255, 255, 255))
    """
    picture, name = decode(source), source_name(source)
    if picture.images > 1 and not _logged.is_set():
        _logged.set()
        text = "%s holds %d images, of which the first is read (logged once)"
        log.warning(text, name, picture.images)
    return to_rgb(picture, name)


def load_bytes(content: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file that was received over the network, as `load_image` does.

    Raises:
        ValueError: as for `load_image`; or the image has more than ``max_pixels`` pixels, which is
            checked before they are decoded.
    """
    return to_rgb(decode_file(BytesIO(content), "the body", max_pixels), "the image")
