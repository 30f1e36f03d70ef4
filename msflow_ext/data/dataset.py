"""What a data set is: named images with their labels and masks, and how folders hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

Faults = list[Exception]  # what a reader finds wrong and goes on


@dataclass(frozen=True)
class Frame:
    """One image of a video; ``index`` counts from 0."""

    video: Path
    index: int

    def __str__(self) -> str:
        return f"{self.video} frame {self.index}"


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        name: unique within its set and safe as a relative file name, such as ``scar/006``.
        label: 0 good, 1 defective, None unknown.
        defect: the kind of defect, ``good`` where there is none.
        image: a file, a frame of a video, or an ``(H, W)`` or ``(H, W, 3)`` array.
        mask: a file or an ``(H, W)`` array, above 0 where the defect is, or a folder of such files
            that together mark it; None where none is known.
    """

    name: str
    label: int | None
    defect: str
    image: Path | Frame | np.ndarray
    mask: Path | np.ndarray | None = None

    @property
    def listed_name(self) -> str:
        """The name with the suffix of its file, as tables of scores have it: ``scar/006.png``."""
        return self.name + (self.image.suffix if isinstance(self.image, Path) else "")


@dataclass(frozen=True)
class DataSet:
    """One category of a data set: good images to train on, and labelled images to test on.

    ``faults`` are the errors that its reader met; what they concern is left out of the items.
    ``folder`` has no files in its folders but those of the items; None where others may lie there.
    """

    name: str
    category: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    faults: tuple[Exception, ...] = ()
    folder: Path | None = None

    @property
    def split(self) -> str:
        """Which images train and which are tested, as 12 hex digits of a SHA-256 of their names."""
        parts = [[item.name for item in part] for part in (self.train, self.test)]
        return hashlib.sha256(repr((self.name, self.category, parts)).encode()).hexdigest()[:12]


def list_images(folder: Path, faults: Faults, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The images right inside ``folder``, sorted by name; hidden files are passed over.

    Faults: there is no such folder, it holds no image, or two whose names differ by the suffix
    only (the first is taken).
    """
    if not folder.is_dir():
        faults.append(FileNotFoundError(f"{folder} is not a folder"))
        return []
    images = _files(folder, suffixes)
    if not images:
        kinds = ", ".join(suffix[1:] for suffix in suffixes)
        faults.append(ValueError(f"{folder} holds no images ({kinds})"))
    return list(_by_stem(images, faults).values())


def match_masks(
    images: Sequence[Path], folder: Path, faults: Faults, suffixes: Sequence[str] = SUFFIXES
) -> list[Path | None]:
    """For each image its mask in ``folder``: ``NAME_mask`` or ``NAME``, a file or a folder of files.

    Faults: there is no such folder, an image has no mask there, a mask has no image.
    """
    if not folder.is_dir():
        faults.append(FileNotFoundError(f"{folder} is not a folder"))
        return [None] * len(images)
    marks = _by_stem(_files(folder, suffixes), faults)
    marks |= {name: folder / name for name in subfolders(folder)}
    found: list[Path | None] = []
    for image in images:
        names = [f"{image.stem}_mask", image.stem]
        mask = next((marks.pop(name) for name in names if name in marks), None)
        if mask is None:
            both = " nor ".join(names)
            faults.append(ValueError(f"{image} has no mask: {folder} holds neither {both}"))
        found.append(mask)
    faults += [ValueError(f"mask {mask} has no image of its name") for mask in marks.values()]
    return found


def subfolders(parent: Path) -> list[str]:
    """The names of the folders in ``parent``, sorted; hidden ones are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is not a folder")
    return sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def hold_out(count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split ``range(count)`` at random into 80% to train on and 20% to test on, each sorted."""
    order = rng.permutation(count)
    train = count * 4 // 5
    return sorted(order[:train].tolist()), sorted(order[train:].tolist())


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _by_stem(paths: Iterable[Path], faults: Faults) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other is not path:
            faults.append(
                ValueError(
                    f"{path.parent} holds both {other.name} and {path.name}; "
                    "results are named without the suffix, so one must be renamed"
                )
            )
    return found
