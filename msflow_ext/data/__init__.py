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

# Names are resolved on first use: the command line needs the layouts without importing torch.
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

#: Data sets in installed packages. Each has a module in ``msflow_ext.data.datasets``, like each of ``LAYOUTS``.
PACKAGED = ("elpv", "textures")
FIXED = ("mvtec", "visa", "btad", "mstc")  # layouts with their own test images

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
    """List the images of a data set with their labels and masks, without decoding them.

    Args:
        data: a folder, or ``"elpv"`` or ``"textures"``, which come from installed packages. A
            folder that has one of these names is given as ``"./elpv"``. None if ``normal`` is
            given.
        layout: how a folder is laid out: ``"mvtec"``, ``"visa"``, ``"btad"``, ``"mtd"``, ``"mstc"``
            or ``"folder"``. The module of that name in ``msflow_ext.data.datasets`` describes it.
        category: the part of the data set to read, such as ``"bottle"``.
        split_seed: seed of the split of good images, where the layout has no test images.
        normal, abnormal, masks: folders, for layout ``"folder"`` only.
        csv: a CSV file that lists the images, for layout ``"folder"`` only.
        strict: raise the first fault of the folders. Otherwise ``DataSet.faults`` holds all faults,
            and `check_dataset` reports them.

    Raises:
        ValueError: the layout or the category is unknown, a folder holds no images, a defect has no
            mask, a mask has no image, two files have one name, or a path leaves the folder.
        FileNotFoundError: a folder or a file is missing.
        ModuleNotFoundError: the package that holds or decodes the data is not installed.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "normal").mkdir()
        >>> Image.new("L", (8, 8)).save(root / "normal" / "a.png")
        >>> dataset = open_dataset(root, "folder")
        >>> [item.name for item in dataset.train]
        ['train/good/a']
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
        raise type(first)(f"{first} ({more} more: run msflow data check)") if more else first
    _log_unread(dataset)
    return dataset


def list_categories(data: str | Path, layout: Layout | None = None) -> list[str]:
    """Return the categories that `open_dataset` can read, none if the data set has no parts.

    Args:
        data: a folder, or ``"elpv"`` or ``"textures"``.
        layout: how a folder is laid out, as for `open_dataset`.

    Raises:
        ValueError: the layout is unknown.
        FileNotFoundError: a folder is missing.

    Examples:
        >>> list_categories("textures")
        ['brick', 'grass', 'gravel']
    """
    reader, root = _reader(data, layout)
    return list(reader.categories(*root))


def _reader(
    data: str | Path | None, layout: Layout | None, *, folders: bool = False
) -> tuple[ModuleType, list[Path | None]]:
    """Return the module that reads ``data``, and the folder to give it, if it needs one.

    With ``folders``, ``data`` may be None: the caller names the folders one by one.
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
