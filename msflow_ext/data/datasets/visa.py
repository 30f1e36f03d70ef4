"""VisA: twelve categories, in the layout of its archive or rearranged."""

from __future__ import annotations

from pathlib import Path

from msflow_ext.data.csv_list import Entry, entries, rows, unique
from msflow_ext.data.dataset import DataSet, Faults, Item, subfolders
from msflow_ext.data.datasets import mvtec

INDEX = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read a category. Both layouts give items with the same names.

    In the archive, ``split_csv/1cls.csv`` lists the images to train and to test on. Rearranged, the
    data set has the tree of MVTec AD, optionally in a folder ``1cls``: ``train/good``,
    ``test/good``, ``test/bad`` and ``ground_truth/bad``. A mask has the name of its image.

    Args:
        root: the folder of all categories. If rearranged, also that of one with ``category=None``.
        category: the object, such as ``candle``.
        split_seed: unused, because this layout has its own test images.

    Raises:
        ValueError: the category does not exist, or the CSV file is invalid.

    References:
        Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
        Segmentation", ECCV 2022.
    """
    if not (root / INDEX).is_file():
        return mvtec.read_tree("visa", _arranged(root), category)
    faults: Faults = []
    table = rows(root / INDEX, COLUMNS, faults)
    names = sorted({row.cells["object"] for row in table})
    if category is None or category not in names:
        raise ValueError(f"category of {root} must be one of {', '.join(names)}, got {category!r}")
    mine = (row for row in table if row.cells["object"] == category)
    found = entries(mine, root, faults, image="image")
    trained = [_item(each, "train/") for each in found if each.split == "train"]
    tested = [_item(each) for each in found if each.split != "train"]
    train, test = unique((trained, tested), faults)
    own = root / category
    folders = tuple(own / name for name in subfolders(own)) if own.is_dir() else ()
    return DataSet("visa", category, train, test, tuple(faults), folders)


def categories(root: Path) -> list[str]:
    """Return the objects of the CSV file, or the categories of the tree."""
    if not (root / INDEX).is_file():
        return mvtec.categories(_arranged(root))
    return sorted({row.cells["object"] for row in rows(root / INDEX, COLUMNS, [])})


def _item(entry: Entry, prefix: str = "") -> Item:
    kind = "good" if entry.defect == "good" else "bad"  # the CSV calls them normal and anomaly
    name = f"{prefix}{kind}/{entry.image.stem}"
    return Item(name, int(kind == "bad"), kind, entry.image, entry.mask)


def _arranged(root: Path) -> Path:
    return root / "1cls" if (root / "1cls").is_dir() else root
