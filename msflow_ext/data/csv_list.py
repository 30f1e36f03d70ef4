"""Read lists of images from CSV files, whose paths must stay in the folder of the data."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

from msflow_ext.data.dataset import Faults, Item

GOOD = ("good", "normal", "ok", "0")


@dataclass(frozen=True)
class Row:
    """The cells of one line by column; an empty cell is ``""``."""

    place: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """The image of one row; ``split`` is ``train``, ``test``, or ``""`` if no row has one."""

    place: str
    image: Path
    mask: Path | None
    defect: str
    split: str


def rows(table: Path, columns: Sequence[str], faults: Faults) -> list[Row]:
    """Return the lines of a CSV file below its header, which must name ``columns``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not text, or a column is missing.
    """
    if not table.is_file():
        raise FileNotFoundError(f"{table} is not a file")
    found = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, restval="", skipinitialspace=True)
            header = lines.fieldnames or ()
            for column in columns:
                if column not in header:
                    had = ", ".join(header)
                    raise ValueError(
                        f"{table} must have a column {column!r}, got the header {had!r}"
                    )
            for cells in lines:
                place = f"{table}, line {lines.line_num}"
                if cells.pop(None, None) is not None:
                    faults.append(ValueError(f"{place}: more cells than the header"))
                else:
                    found.append(Row(place, {key: cell.strip() for key, cell in cells.items()}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    return found


def entries(table: Iterable[Row], root: Path, faults: Faults, image: str = "path") -> list[Entry]:
    """Return the images that rows name in the columns ``image``, ``label``, ``mask`` and ``split``.

    A row with a fault is left out. Faults are:

    - a file that is missing or outside ``root``;
    - an empty label, or an invalid split, or one that only some rows have;
    - a defect to train on;
    - a defect without a mask, if other defects have one.
    """
    found: list[Entry] = []
    for row in table:
        try:
            found.append(_entry(row, root, image))
        except (OSError, ValueError) as error:
            faults.append(error)
    split = any(each.split for each in found)
    masks = any(each.mask for each in found if each.defect != "good")
    kept = []
    for each in found:
        if split and not each.split:
            faults.append(
                ValueError(f"{each.place}: split must be train or test, as in other rows, got ''")
            )
        elif each.defect != "good" and each.split == "train":
            faults.append(
                ValueError(f"{each.place}: a training image must be good, got {each.image}")
            )
        elif masks and each.defect != "good" and not each.mask:
            faults.append(
                ValueError(f"{each.place}: {each.image} must have a mask, as other defects do")
            )
        else:
            kept.append(each)
    return kept


def unique(parts: Iterable[Iterable[Item]], faults: Faults) -> list[tuple[Item, ...]]:
    """Return the parts without repeated names, which are faults; the first item of a name is kept."""
    found: dict[str, Item] = {}
    for item in chain.from_iterable(parts := [list(part) for part in parts]):
        other = found.setdefault(item.name, item)
        if other is not item:
            faults.append(ValueError(f"{other.image} and {item.image} are both called {item.name}"))
    return [tuple(item for item in part if found[item.name] is item) for part in parts]


def inside(root: Path, path: str) -> Path:
    """Return the file ``path`` in ``root``.

    Raises:
        ValueError: the path leaves ``root``: it is absolute, contains ``..``, or is a link.
        FileNotFoundError: the path is not a file.
    """
    readings = PurePosixPath(path), PureWindowsPath(path)
    if any(p.is_absolute() or ".." in p.parts for p in readings):
        raise ValueError(f"path must be relative to {root} and without .., got {path!r}")
    try:
        found = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise ValueError(f"path {path!r} cannot be resolved: {error}") from error
    if not found.is_relative_to(root.resolve()):
        raise ValueError(f"path must stay in {root}, got {path!r}, a link to {found}")
    if not found.is_file():
        raise FileNotFoundError(f"{root / path} is not a file")
    return root / path


def _entry(row: Row, root: Path, image: str) -> Entry:
    label, split = row.cells["label"], row.cells.get("split", "").lower()
    try:
        for column in (image, "label"):
            if not row.cells[column]:
                raise ValueError(f"{column} must not be empty")
        if split not in ("", "train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        path = inside(root, row.cells[image])
        mask = inside(root, row.cells["mask"]) if row.cells.get("mask") else None
    except (OSError, ValueError) as error:
        raise type(error)(f"{row.place}: {error}") from error
    defect = "good" if label.lower() in GOOD else "defective" if label == "1" else label
    return Entry(row.place, path, mask, defect, split)
