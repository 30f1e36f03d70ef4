"""Yield the images in files, folders, arrays and tensors one by one, each with its name."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from msflow_ext.data import load_image
from msflow_ext.data.walk import APART, OURS, SUFFIXES, summary, walk

if TYPE_CHECKING:
    from PIL import Image

    from msflow_ext.data.dataset import Frame

#: Sources of images, see :func:`images_of`.
Source: TypeAlias = "str | Path | Frame | Image.Image | np.ndarray | Tensor | Iterable[Source]"
#: Iterable types that do not hold images.
_NO_SOURCES = (bytes, bytearray, memoryview, io.IOBase, Mapping)


class Named(NamedTuple):
    """An image or its file, with the name of its result."""

    name: str
    image: Any


def listed(paths: Sequence[str | Path], *, apart: Iterable[Path] = ()) -> dict[str, Path]:
    """List every image of files and folders by its name, without reading one.

    Args:
        apart: folders to pass over, as for :func:`msflow_ext.data.walk.walk`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: there are no images, or one is given twice.
    """
    found: dict[str, Path] = {}
    for name, path in images_of(paths[0] if len(paths) == 1 else paths, apart=apart):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = path
    if not found:
        raise ValueError(f"{' '.join(map(str, paths))} holds no images")
    return found


def images_of(
    source: Source,
    numbers: Iterator[int] | None = None,
    *,
    one: bool = True,
    apart: Iterable[Path] = (),
) -> Iterator[Named]:
    """Yield every image in ``source`` with its name, as a path, an array or a tensor.

    An image in a folder is named by its path relative to the folder. If there are several sources
    (``one`` is False), the name includes the folder, so that names are unique.

    Folders are searched by :func:`msflow_ext.data.walk.walk`; one line in the log names the files
    passed over. A folder without images is an error, except among several sources if it holds
    pictures that this package wrote.
    """
    from PIL import Image

    numbers = count() if numbers is None else numbers
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        found = walk(source, apart=apart)
        ours = not {APART, OURS}.isdisjoint(found.passed_over.values())
        if not found.files and (one or not ours):
            kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
            rest = f"; {summary(found.passed_over)}" if found.passed_over else ""
            raise ValueError(f"{source} holds no images ({kinds}){rest}")
        found.log_passed_over()
        for name, path in zip(found.files, found.paths, strict=True):
            yield Named(name if one else path.as_posix(), path)
    elif isinstance(source, (str, Path)):
        if not Path(source).exists() and not {"*", "?", "["}.isdisjoint(str(source)):
            raise FileNotFoundError(
                f"{source} is not a file; patterns are not expanded. Give a folder or the files "
                "(pathlib.Path(...).glob(...), or the pattern without quotes in a shell)."
            )
        yield Named(str(source), Path(source))
    elif isinstance(source, Image.Image):
        yield Named(f"image {next(numbers)}", _pixels(source))
    elif isinstance(source, (np.ndarray, Tensor)) and source.ndim != 4:
        yield Named(f"image {next(numbers)}", source)
    elif isinstance(source, Iterable) and not isinstance(source, _NO_SOURCES):
        for each in source:
            yield from images_of(each, numbers, one=False, apart=apart)
    else:
        raise TypeError(
            "source must be a path, a PIL image, an array, a tensor or an iterable of these, "
            f"got {type(source).__name__}"
        )


def own_size(named: tuple[str, Any]) -> Tensor:
    """Return a named image without resizing, ``(3, H, W)``: uint8, or a tensor as it was given."""
    name, image = named
    if not isinstance(image, Tensor):
        return torch.from_numpy(np.array(load_image(image))).permute(2, 0, 1)
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point() or not image.numel():
        raise ValueError(
            f"{name}: a tensor must be (3, H, W) of floating point, "
            f"got {tuple(image.shape)} of {image.dtype}"
        )
    return image


def _pixels(image: Any) -> np.ndarray:
    """Convert a PIL image to an array that :func:`msflow_ext.data.load_image` reads without loss."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return np.asarray(upright).astype(np.uint16)
    return np.asarray(upright if upright.mode in ("I", "F") else upright.convert("RGBA"))
