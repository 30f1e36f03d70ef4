"""Data sets and their items: named images with labels and masks, and how folders hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from msflow_ext.data.walk import APART, SUFFIXES, Found, walk

Faults = list[Exception]  # errors that a reader collects while it continues


@dataclass(frozen=True)
class Frame:
    """One image of a video.

    Attributes:
        video: the file.
        index: the frame's number, counted from 0.

    Examples:
        >>> print(Frame(Path("01_001.avi"), 5))
        01_001.avi frame 5
    """

    video: Path
    index: int

    def __str__(self) -> str:
        return f"{self.video} frame {self.index}"


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        name: unique within its set and safe as a relative file name, such as ``scar/006``.
        label: 0 for a good image, 1 for a defective one, None if unknown.
        defect: the kind of defect, ``good`` if there is none.
        image: a file, a frame of a video, or an ``(H, W)`` or ``(H, W, 3)`` array.
        mask: a file or an ``(H, W)`` array that is above 0 on the defect, or a folder of such files
            whose union marks it. None if the defect is not marked.

    Examples:
        >>> item = Item("scar/006", 1, "scar", Path("test/scar/006.png"))
        >>> item.listed_name
        'scar/006.png'
    """

    name: str
    label: int | None
    defect: str
    image: Path | Frame | np.ndarray
    mask: Path | np.ndarray | None = None

    @property
    def listed_name(self) -> str:
        """The name with the suffix of its file, as in tables of scores: ``scar/006.png``."""
        return self.name + (self.image.suffix if isinstance(self.image, Path) else "")


@dataclass(frozen=True)
class DataSet:
    """One category of a data set: good images to train on, and labelled images to test on.

    Attributes:
        name: the layout or the package, such as ``mvtec``.
        category: the part of the data set.
        train: the good images to train on.
        test: the images to test on.
        faults: the errors that the reader found. Files with faults are left out of the items.
        folders: the folders that hold the files of the items and should hold no others.

    Examples:
        >>> image = np.zeros((8, 8), np.uint8)
        >>> train = (Item("train/good/0", 0, "good", image),)
        >>> dataset = DataSet("mine", "part", train, test=())
        >>> dataset.split
        'bb4031f4ad0f'
    """

    name: str
    category: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    faults: tuple[Exception, ...] = ()
    folders: tuple[Path, ...] = ()

    @property
    def split(self) -> str:
        """Identify the split: 12 hex digits of a SHA-256 of the names in train and test."""
        parts = [[item.name for item in part] for part in (self.train, self.test)]
        return hashlib.sha256(repr((self.name, self.category, parts)).encode()).hexdigest()[:12]


def list_images(
    folder: Path,
    faults: Faults,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    deep: bool = False,
    apart: Iterable[Path] = (),
) -> list[Path]:
    """Return the images directly in ``folder``, sorted by name; with ``deep``, also those below it.

    :func:`msflow_ext.data.walk.walk` describes which files are passed over, and ``apart``.

    Faults: the folder does not exist, cannot be read or holds no image; or two names differ only in
    the suffix, of which the first is kept.
    """
    found = _found(folder, faults, suffixes, deep, apart)
    if found is None:
        return []
    if not found.files:
        kinds = ", ".join(suffix[1:] for suffix in suffixes)
        faults.append(ValueError(f"{folder} holds no images ({kinds})"))
    return list(_by_stem(found, faults).values())


def match_masks(
    images: Sequence[Path],
    folder: Path,
    faults: Faults,
    suffixes: Sequence[str] = SUFFIXES,
    *,
    within: Path | None = None,
    apart: Iterable[Path] = (),
) -> list[Path | None]:
    """Return each image's mask in ``folder``: ``NAME_mask`` or ``NAME``, a file or a folder of files.

    ``within`` is the folder whose sub-folders were searched for images. A name is then the path
    relative to it, and the masks are in sub-folders of the same names.

    Faults: the folder does not exist, an image has no mask there, or a mask has no image.
    """
    found = _found(folder, faults, suffixes, within is not None, apart)
    if found is None:
        return [None] * len(images)
    marks = _by_stem(found, faults)
    marks |= {name: folder / name for name in found.folders}
    names = [image.stem if within is None else stem_in(within, image) for image in images]
    masks = [
        next((marks[name] for name in (f"{each}_mask", each) if name in marks), None)
        for each in names
    ]
    for image, name, mask in zip(images, names, masks, strict=True):
        if mask is None:
            both = f"{name}_mask nor {name}"
            faults.append(ValueError(f"{image} has no mask: {folder} holds neither {both}"))
    of_images = {parent for name in names for parent in PurePosixPath(name).parents}
    used = {mask for mask in masks if mask is not None}
    for name, mask in sorted(marks.items()):
        if PurePosixPath(name) not in of_images and used.isdisjoint((mask, *mask.parents)):
            faults.append(ValueError(f"mask {mask} has no image of the same name"))
            used.add(mask)  # and, if it is a folder, everything in it
    return masks


def stem_in(folder: Path, path: Path) -> str:
    """Return the path of a file relative to ``folder``, without the suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def subfolders(parent: Path) -> list[str]:
    """Return the sorted names of the folders in ``parent``, without hidden ones.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be read.
    """
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is not a folder")
    return walk(parent, deep=False).folders


def unread(dataset: DataSet) -> dict[str, str]:
    """Return the files and folders of a data set that are not read, each with the reason or ``""``."""
    items = (*dataset.train, *dataset.test)
    read = {path for item in items for path in (item.image, item.mask) if isinstance(path, Path)}
    holders = {parent for path in read for parent in path.parents}
    left: dict[str, str] = {}
    for folder in filter(Path.is_dir, dataset.folders):
        found = walk(folder, apart=[each for each in dataset.folders if each != folder])
        for name in found.files:
            if read.isdisjoint((folder / name, (folder / name).parent)):  # a mask may be a folder
                left[f"{folder.name}/{name}"] = ""
        for name, reason in found.passed_over.items():
            if reason != APART and folder / name not in holders | read:
                left[f"{folder.name}/{name}"] = reason
    return left


def hold_out(count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split ``range(count)`` at random into 80% to train on and 20% to test on, each sorted."""
    order = rng.permutation(count)
    train = count * 4 // 5
    return sorted(order[:train].tolist()), sorted(order[train:].tolist())


def _found(
    folder: Path, faults: Faults, suffixes: Sequence[str], deep: bool, apart: Iterable[Path]
) -> Found | None:
    if not folder.is_dir():
        faults.append(FileNotFoundError(f"{folder} is not a folder"))
        return None
    try:
        return walk(folder, suffixes, deep=deep, apart=apart)
    except OSError as error:
        faults.append(OSError(f"{folder} cannot be read: {error.strerror}"))
        return None


def _by_stem(walked: Found, faults: Faults) -> dict[str, Path]:
    """Index the files that were found by their names without the suffix."""
    found: dict[str, Path] = {}
    for path in walked.paths:
        other = found.setdefault(stem_in(walked.folder, path), path)
        if other is not path:
            faults.append(
                ValueError(
                    f"{path.parent} holds both {other.name} and {path.name}; "
                    "results are named without the suffix, so one must be renamed"
                )
            )
    return found
