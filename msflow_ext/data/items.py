"""What a data set is: named images with their labels and masks, and how folders hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        name: unique within its set and safe as a relative file name, such as ``scar/006``.
        label: 0 good, 1 defective, None unknown.
        defect: the kind of defect, ``good`` where there is none.
        image: a file, or an ``(H, W)`` or ``(H, W, 3)`` array.
        mask: a file or an ``(H, W)`` array, above 0 where the defect is; None where none is known.
    """

    name: str
    label: int | None
    defect: str
    image: Path | np.ndarray
    mask: Path | np.ndarray | None = None


@dataclass(frozen=True)
class DataSet:
    """One category of a data set: good images to train on, and labelled images to test on."""

    name: str
    category: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]


def list_images(folder: Path) -> list[Path]:
    """The images right inside ``folder``, sorted by name; hidden files are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image, or two whose names differ by the suffix only.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    images = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(s[1:] for s in SUFFIXES)})")
    stems: dict[str, Path] = {}
    for path in images:
        other = stems.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{folder} holds both {other.name} and {path.name}; "
                "results are named without the suffix, so one must be renamed"
            )
    return images


def match_masks(images: Sequence[Path], folder: Path) -> list[Path]:
    """For each image its mask in ``folder``: ``NAME_mask`` or ``NAME``, with any image suffix.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an image has no mask there.
    """
    by_stem = {path.stem: path for path in list_images(folder)}
    masks = []
    for image in images:
        mask = by_stem.get(f"{image.stem}_mask") or by_stem.get(image.stem)
        if mask is None:
            raise ValueError(
                f"{image} has no mask: {folder} holds neither {image.stem}_mask nor {image.stem}"
            )
        masks.append(mask)
    return masks


def hold_out(count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split ``range(count)`` at random into 80% to train on and 20% to test on, each sorted."""
    order = rng.permutation(count)
    train = count * 4 // 5
    return sorted(order[:train].tolist()), sorted(order[train:].tolist())
