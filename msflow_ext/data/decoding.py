"""Decode images and masks of any usual kind, each in its own size."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msflow_ext.data import video
from msflow_ext.data.dataset import Frame
from msflow_ext.data.walk import walk

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # those of SUFFIXES; others start programs
Source = str | Path | Frame | np.ndarray


def load_image(source: Source) -> Image.Image:
    """Decode a file, a frame of a video or an array into an 8-bit RGB image.

    Gray is repeated, 16-bit gray is scaled by 1/257 (65535 is white), a palette is looked up, an
    alpha channel is dropped (the colours under it are kept), the EXIF orientation is applied, and
    of several pages the first is taken.

    Args:
        source: a file of any format that Pillow reads, a frame, or an array: ``(H, W)`` bool,
            uint8 or uint16, or ``(H, W, 3)`` or ``(H, W, 4)`` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, damaged, no image, of 32 bits a pixel, or so large
            that Pillow takes it for a decompression bomb; an array has another shape.
        TypeError: an array has another dtype.
    """
    return to_rgb(decode(source), source_name(source))


def load_bytes(content: bytes, max_pixels: int) -> Image.Image:
    """Decode the content of an image file that a stranger sent, as `load_image` does a file.

    Raises:
        ValueError: as `load_image`; the kind is none of `SUFFIXES`, or there are more than
            ``max_pixels`` pixels, which is seen before they are decoded.
    """
    return to_rgb(_decoded(BytesIO(content), "the body", KINDS, max_pixels), "the image")


def read_mask(source: Source, image: Source | None = None) -> np.ndarray:
    """Decode a mask into bool ``(H, W)``: True where any colour is above 0.

    So 0/1, 0/255, 16 bits, 1 bit and palettes (by their colours) all work; alpha does not count.

    Args:
        source: a file that Pillow reads, a folder of such files, which together are the mask, or a
            bool or integer ``(H, W)`` array.
        image: what the mask belongs to; given, both must have the same size.

    Raises:
        ValueError: the mask is of another size than its image, or cannot be decoded.
        TypeError: an array is neither bool nor integer.
    """
    if isinstance(source, np.ndarray):
        if source.dtype.kind not in "biu":
            raise TypeError(f"a mask array must be bool or integer, got {source.dtype}")
        if source.ndim != 2 or source.size == 0:
            raise ValueError(f"a mask array must be (H, W), got {source.shape}")
        defect = source > 0
    elif isinstance(source, (str, Path)) and Path(source).is_dir():
        defect = _union(Path(source))
    else:
        defect = _above_zero(decode(source))
    if image is not None and defect.shape[::-1] != (size := decode(image).size):
        raise ValueError(
            f"mask {source_name(source)} is {defect.shape[1]}x{defect.shape[0]} pixels, "
            f"its image {source_name(image)} is {size[0]}x{size[1]}"
        )
    return defect


def decode(source: Source) -> Image.Image:
    """Read all pixels of a source in its own mode, turned as its EXIF says; raises as `load_image`."""
    if isinstance(source, Frame):
        source = video.load_frame(source)
    return _of_array(source) if isinstance(source, np.ndarray) else _of_file(Path(source))


def source_name(source: Source) -> str:
    """What to call a source in a sentence."""
    if isinstance(source, np.memmap):
        return str(source.filename)
    return "an array" if isinstance(source, np.ndarray) else str(source)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as `load_image` says."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits a pixel, of which no value is known to be white")
    if image.mode in ("P", "PA"):  # straight to RGB, Pillow would warn about transparency
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has colours that cannot be shown as RGB: {error}") from error


def _of_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return _decoded(path, str(path))


def _decoded(
    file: Path | BytesIO,
    name: str,
    kinds: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=kinds) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {max_pixels}")
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
            return turned
    except UnidentifiedImageError as error:
        among = f" of the kinds {', '.join(kinds)}" if kinds else ""
        raise ValueError(f"{name} is not an image{among}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _of_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    if array.dtype not in (np.bool_, np.uint8, np.uint16):
        raise TypeError(f"an image array must be bool, uint8 or uint16, got {array.dtype}")
    colours = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if array.size == 0 or not (array.ndim == 2 or colours):
        wanted = "(H, W), or (H, W, 3) or (H, W, 4) of uint8"
        raise ValueError(f"an image array must be {wanted}, got {array.shape} of {array.dtype}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return Image.fromarray(np.ascontiguousarray(array))


def _union(folder: Path) -> np.ndarray:
    masks = [_above_zero(decode(path)) for path in walk(folder, deep=False).paths]
    if len({mask.shape for mask in masks}) != 1:
        raise ValueError(f"mask {folder} is a folder of {len(masks)} images, not all of one size")
    return np.any(masks, axis=0)


def _above_zero(image: Image.Image) -> np.ndarray:
    """Bool ``(H, W)``: where an image of any mode is not black; alpha does not count."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and image.mode[:4] != "I;16":
        image = image.convert("RGB")
    values = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        values = values[..., :-1]
    return np.any((values > 0).reshape(image.height, image.width, -1), axis=2)
