"""Data sets: named images with labels and masks, from a folder or from an installed package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import elpv, folder, mvtec, textures
from .images import Images, load_image, load_mask
from .items import DataSet, Item

__all__ = ["DataSet", "Images", "Item", "load_image", "load_mask", "open_dataset"]

PACKAGED: dict[str, Callable[..., DataSet]] = {"elpv": elpv.read, "textures": textures.read}
LAYOUTS: dict[str, Callable[..., DataSet]] = {"mvtec": mvtec.read, "folder": folder.read}


def open_dataset(
    data: str | Path | None,
    layout: str | None = None,
    category: str | None = None,
    *,
    split_seed: int = 0,
    normal: str | Path | None = None,
    abnormal: str | Path | None = None,
    masks: str | Path | None = None,
) -> DataSet:
    """Find the images of a data set, their labels and masks; nothing is decoded yet.

    Args:
        data: ``"elpv"`` or ``"textures"``, which are packages, or a folder. (A folder of such a
            name is ``"./elpv"``.) None if ``normal`` says all.
        layout: how a folder is laid out: ``"mvtec"`` or ``"folder"``.
        category: which part of the set; see `elpv`, `textures`, `mvtec`.
        split_seed: seeds the split of good images where the set has no fixed one.
        normal, abnormal, masks: folders, for layout ``"folder"`` only; see there.

    Raises:
        ValueError: an unknown layout or category, a folder without images, a defect without mask.
        FileNotFoundError: a folder is missing.
        ModuleNotFoundError: the package that holds the data is not installed.
    """
    if not isinstance(split_seed, int) or split_seed < 0:
        raise ValueError(f"split_seed must be a whole number from 0 up, got {split_seed!r}")
    folders = {"normal": normal, "abnormal": abnormal, "masks": masks}
    folders = {name: path for name, path in folders.items() if path is not None}
    if folders and layout != "folder":
        raise ValueError(f"{', '.join(folders)} can only be given with layout 'folder'")

    if isinstance(data, str) and data in PACKAGED:
        if layout is not None:
            raise ValueError(f"data {data!r} is a package and has no layout, got {layout!r}")
        return PACKAGED[data](category, split_seed)
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout of data {str(data)!r} must be one of {', '.join(LAYOUTS)}, got {layout!r}; "
            f"without a layout, data must be one of {', '.join(PACKAGED)}"
        )
    if data is None and not folders:
        raise ValueError("data must be a folder, got None")
    root = None if data is None else Path(data)
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"data {root} is not a folder")
    return LAYOUTS[layout](root, category, split_seed, **folders)
