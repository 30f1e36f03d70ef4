"""VisA: twelve categories of one-class images, as its archive holds them or re-arranged."""

from __future__ import annotations

from pathlib import Path

from msflow_ext.data.csv_list import Entry, entries, rows, unique
from msflow_ext.data.dataset import DataSet, Faults, Item, subfolders
from msflow_ext.data.datasets import mvtec

INDEX = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read a category; both layouts give items of the same names.

    As its archive holds it, ``root`` has ``split_csv/1cls.csv``, which says what is trained and
    tested. Re-arranged, it is the tree of MVTec AD, perhaps in a folder ``1cls``: ``train/good``,
    ``test/good``, ``test/bad`` and ``ground_truth/bad``, where a mask is called as its image is.

    Args:
        root: the folder of all categories; re-arranged, with ``category=None`` that of one.
        split_seed: unused; this layout says itself what is trained and tested.

    Raises:
        ValueError: no such category, or a CSV that cannot be read.
    Source: Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
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
    """Return the objects of the CSV, or the categories of the tree."""
    if not (root / INDEX).is_file():
        return mvtec.categories(_arranged(root))
    return sorted({row.cells["object"] for row in rows(root / INDEX, COLUMNS, [])})


def _item(entry: Entry, prefix: str = "") -> Item:
    kind = "good" if entry.defect == "good" else "bad"  # the CSV calls them normal and anomaly
    name = f"{prefix}{kind}/{entry.image.stem}"
    return Item(name, int(kind == "bad"), kind, entry.image, entry.mask)


def _arranged(root: Path) -> Path:
    return root / "1cls" if (root / "1cls").is_dir() else root
