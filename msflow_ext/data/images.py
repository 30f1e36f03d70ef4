"""Decode images and masks of any usual kind into the tensors that models see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .items import Item

if TYPE_CHECKING:
    from PIL import Image


class Images(torch.utils.data.Dataset[torch.Tensor]):
    """Items as float32 ``(3, size, size)`` tensors, RGB in 0..1, resized with Lanczos.

    The whole image is resized, whatever its aspect; nothing is cropped.

    Raises:
        ValueError: ``size`` is not a positive whole number; on access, a file cannot be decoded.
    """

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items = tuple(items)
        self.size = _checked_size(size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        image = load_image(self.items[index].image)
        image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return levels.to(torch.float32, memory_format=torch.contiguous_format) / 255

    def mask(self, index: int) -> np.ndarray | None:
        """Bool ``(size, size)``, True on the defect; None where nobody has marked it.

        Raises:
            ValueError: the mask is of another size than its image, or cannot be decoded.
        """
        item = self.items[index]
        if item.label == 0:
            return np.zeros((self.size, self.size), dtype=bool)
        if item.label is None or item.mask is None:
            return None
        return load_mask(item.mask, self.size, item.image)


def load_image(source: str | Path | np.ndarray) -> Image.Image:
    """Decode a file or an array into an 8-bit RGB image.

    Gray is repeated, 16-bit gray is scaled by 1/257 (65535 is white), a palette is looked up, an
    alpha channel is dropped (the colours under it are kept), the EXIF orientation is applied, and
    of several pages the first is taken.

    Args:
        source: a file of any format that Pillow reads, or an array: ``(H, W)`` bool, uint8 or
            uint16, or ``(H, W, 3)`` or ``(H, W, 4)`` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, damaged, no image, of 32 bits a pixel, or so large
            that Pillow takes it for a decompression bomb; an array has another shape.
        TypeError: an array has another dtype.
    """
    from PIL import Image

    image = _image_of_array(source) if isinstance(source, np.ndarray) else _decode(Path(source))
    name = "an array" if isinstance(source, np.ndarray) else source
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


def load_mask(
    source: str | Path | np.ndarray, size: int, image: str | Path | np.ndarray | None = None
) -> np.ndarray:
    """Decode a mask into bool ``(size, size)``: True where any colour is above 0.

    So 0/1, 0/255, 16 bits, 1 bit and palettes (by their colours) all work. The resize takes the
    nearest pixel.

    Args:
        source: a file that Pillow reads, or a bool or integer ``(H, W)`` array.
        image: what the mask belongs to; given, both must have the same size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the mask is of another size than its image, or cannot be decoded.
        TypeError: an array is neither bool nor integer.
    """
    from PIL import Image

    _checked_size(size)
    if isinstance(source, np.ndarray):
        if source.dtype.kind not in "biu":
            raise TypeError(f"a mask array must be bool or integer, got {source.dtype}")
        if source.ndim != 2 or source.size == 0:
            raise ValueError(f"a mask array must be (H, W), got {source.shape}")
        defect = source > 0
    else:
        defect = _above_zero(_decode(Path(source)))
    if image is not None:
        width, height = load_image(image).size
        if defect.shape != (height, width):
            names = ["an array" if isinstance(s, np.ndarray) else str(s) for s in (source, image)]
            raise ValueError(
                f"mask {names[0]} is {defect.shape[1]}x{defect.shape[0]} pixels, "
                f"its image {names[1]} is {width}x{height}"
            )
    resized = Image.fromarray(defect.astype(np.uint8)).resize(
        (size, size), Image.Resampling.NEAREST
    )
    return np.asarray(resized) > 0


def _decode(path: Path) -> Image.Image:
    """Read all of a file's pixels, in the file's own mode, turned as its EXIF says."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
            return turned
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _image_of_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    if array.dtype not in (np.bool_, np.uint8, np.uint16):
        raise TypeError(f"an image array must be bool, uint8 or uint16, got {array.dtype}")
    colours = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if array.size == 0 or not (array.ndim == 2 or colours):
        raise ValueError(
            "an image array must be (H, W), or (H, W, 3) or (H, W, 4) of uint8, "
            f"got {array.shape} of {array.dtype}"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return Image.fromarray(np.ascontiguousarray(array))


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


def _checked_size(size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be a positive whole number of pixels, got {size!r}")
    return size
