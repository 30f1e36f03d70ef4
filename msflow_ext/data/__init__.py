"""Data sets: named images with labels and masks, from a folder or from an installed package."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from msflow_ext.choices import FITS, LAYOUTS, Layout

if TYPE_CHECKING:
    from msflow_ext.data.check import Report, check_dataset
    from msflow_ext.data.dataset import DataSet, Frame, Item
    from msflow_ext.data.decoding import load_image
    from msflow_ext.data.images import Images, load_mask

__all__ = [
    "FITS",
    "FIXED",
    "LAYOUTS",
    "PACKAGED",
    "DataSet",
    "Frame",
    "Images",
    "Item",
    "Report",
    "check_dataset",
    "list_categories",
    "load_image",
    "load_mask",
    "open_dataset",
]

# Names are resolved on first use: the command line needs the layouts, and not torch.
_HOME = {
    "DataSet": "dataset",
    "Frame": "dataset",
    "Images": "images",
    "Item": "dataset",
    "Report": "check",
    "check_dataset": "check",
    "load_image": "decoding",
    "load_mask": "images",
}

#: Installed data sets; each is a module of ``msflow_ext.data.datasets``, like each of ``LAYOUTS``.
PACKAGED = ("elpv", "textures")
FIXED = (
    "mvtec",
    "visa",
    "btad",
    "mstc",
)  # layouts with a fixed split into training and test images

log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_dataset(
    data: str | Path | None,
    layout: Layout | None = None,
    category: str | None = None,
    *,
    split_seed: int = 0,
    normal: str | Path | None = None,
    abnormal: str | Path | None = None,
    masks: str | Path | None = None,
    csv: str | Path | None = None,
    strict: bool = True,
) -> DataSet:
    """Find the images of a data set with their labels and masks, without decoding any.

    Args:
        data: ``"elpv"`` or ``"textures"``, which are packages, or a folder. (A folder of such a
            name is ``"./elpv"``.) None if ``normal`` says all.
        layout: how a folder is laid out: ``"mvtec"``, ``"visa"``, ``"btad"``, ``"mtd"``, ``"mstc"``
            or ``"folder"``, each a module of this package that says what it reads.
        category: which part of the set; see there.
        split_seed: seeds the split of good images where the set has no fixed one.
        normal, abnormal, masks: folders, for layout ``"folder"`` only; see there.
        csv: a list of the images, for layout ``"folder"`` only; see there.
        strict: raise the first fault of the folders. Else all of them are in ``DataSet.faults``,
            and `check_dataset` reports them.

    Raises:
        ValueError: an unknown layout or category, a folder without images, a defect without mask,
            a mask without image, two files of one name, a path that leaves the folder.
        FileNotFoundError: a folder or a file is missing.
        ModuleNotFoundError: the package that holds the data, or decodes it, is not installed.

    Examples:
        >>> dataset = open_dataset(None, "folder", normal="normal", abnormal="odd")
        >>> len(dataset.train), len(dataset.test)  # a fifth of the normal images is tested, too
        (24, 10)
        >>> dataset.test[-1].name, dataset.test[-1].label
        ('abnormal/3', 1)
    """
    if not isinstance(split_seed, int) or split_seed < 0:
        raise ValueError(f"split_seed must be a whole number from 0 up, got {split_seed!r}")
    given = {"normal": normal, "abnormal": abnormal, "masks": masks, "csv": csv}
    given = {name: path for name, path in given.items() if path is not None}
    if given and layout != "folder":
        raise ValueError(f"{', '.join(given)} can only be given with layout 'folder'")
    reader, root = _reader(data, layout, folders=bool(given))
    dataset = reader.read(*root, category, split_seed, **given)
    if not strict:
        return dataset
    if dataset.faults:
        first, more = dataset.faults[0], len(dataset.faults) - 1
        raise type(first)(f"{first} ({more} more: msflow data check)") if more else first
    _log_unread(dataset)
    return dataset


def list_categories(data: str | Path, layout: Layout | None = None) -> list[str]:
    """Return the categories that `open_dataset` can read; an empty list if the set has none.

    Raises:
        ValueError: an unknown layout.
        FileNotFoundError: a folder is missing.
    """
    reader, root = _reader(data, layout)
    return list(reader.categories(*root))


def _reader(
    data: str | Path | None, layout: Layout | None, *, folders: bool = False
) -> tuple[ModuleType, list[Path | None]]:
    """Return the module that reads ``data``, and the folder to read if it needs one.

    ``folders`` may stand for ``data``.
    """
    if isinstance(data, str) and data in PACKAGED:
        if layout is not None:
            raise ValueError(f"data {data!r} is a package and has no layout, got {layout!r}")
        return _module(data), []
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout of data {str(data)!r} must be one of {', '.join(LAYOUTS)}, got {layout!r}; "
            f"without a layout, data must be one of {', '.join(PACKAGED)}"
        )
    if data is None and folders:
        return _module(layout), [None]
    if data is None:
        raise ValueError("data must be a folder, got None")
    if not Path(data).is_dir():
        raise FileNotFoundError(f"data {data} is not a folder")
    return _module(layout), [Path(data)]


def _log_unread(dataset: DataSet) -> None:
    from msflow_ext.data.dataset import unread
    from msflow_ext.data.walk import summary

    if left := unread(dataset):
        log.warning("%s %s: %s", dataset.name, dataset.category, summary(left))


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.datasets.{name}")
