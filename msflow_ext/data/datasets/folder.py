"""Read folders of normal images, abnormal images and masks, or a CSV file that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from msflow_ext.data.csv_list import Entry, entries, rows, unique
from msflow_ext.data.dataset import (
    DataSet,
    Faults,
    Item,
    hold_out,
    list_images,
    match_masks,
    stem_in,
)


def read(
    root: Path | None,
    category: str | None = None,
    split_seed: int = 0,
    *,
    normal: str | Path | None = None,
    abnormal: str | Path | None = None,
    masks: str | Path | None = None,
    csv: str | Path | None = None,
) -> DataSet:
    """Read ``normal``, ``abnormal`` and ``masks``, or ``csv``, with paths relative to ``root``.

    Folders are searched with their sub-folders (:func:`msflow_ext.data.walk.walk`). A given folder
    inside another is not part of the outer one. By default, the folders ``normal``, ``abnormal``
    and ``masks`` in ``root`` are read if they exist. Without abnormal images, all normal images are
    trained on and none are tested. With them, a seeded 80% of the normal images are trained on, and
    the others are tested. A mask has the name of its image, or ``NAME_mask``, and is in a sub-folder
    of the same name.

    The header of a CSV file has the columns ``path`` and ``label``, and optionally ``mask`` and
    ``split``. Paths are relative to ``root`` and stay in it. The label of a good image is ``good``,
    ``normal``, ``ok`` or ``0``; that of another is the kind of its defect, or ``1``. A split is
    ``train`` or ``test``. Without that column, images are split as those of folders.

    Raises:
        ValueError: the options contradict each other, the CSV file is invalid, or a category is
            given.
        FileNotFoundError: the CSV file does not exist.
    """
    if category is not None:
        raise ValueError(f"layout folder has no categories, got category {category!r}")
    if csv is not None:
        if root is None or normal or abnormal or masks:
            raise ValueError(
                "csv needs data, the folder of its paths, without normal, abnormal or masks"
            )
        return _listed(root, root / csv, split_seed)
    given = {"normal": normal, "abnormal": abnormal, "masks": masks}
    given = {name: path for name, path in given.items() if path is not None}
    if root is not None and not given:
        there = (name for name in ("abnormal", "masks") if (root / name).exists())
        given = {name: name for name in ("normal", *there)}
    if "normal" not in given:
        raise ValueError("layout folder needs normal, a folder of good images")
    places = {name: (root or Path()) / path for name, path in given.items()}
    _check_different(places)
    name = (root if root is not None else places["normal"]).absolute().name
    return _searched(name, places, split_seed)


def categories(root: Path) -> list[str]:
    """Return no categories: this layout has none."""
    return []


def _searched(name: str, places: Mapping[str, Path], seed: int) -> DataSet:
    """Return the images of the folders ``normal`` (required), ``abnormal`` and ``masks``."""
    faults: Faults = []
    if "masks" in places and "abnormal" not in places:
        lost = f"masks {places['masks']} need abnormal, the folder of the images that they mark"
        faults.append(ValueError(lost))

    def images(name: str) -> list[Path]:
        return list_images(places[name], faults, deep=True, apart=_others(places, name))

    def stem(name: str, path: Path) -> str:
        return stem_in(places[name], path)

    tested, normal = "abnormal" in places, places["normal"]
    trained, held_out = _split(images("normal"), tested, seed, normal, faults)
    train = [Item(f"train/good/{stem('normal', p)}", 0, "good", p) for p in trained]
    test = [Item(f"good/{stem('normal', p)}", 0, "good", p) for p in held_out]
    if "abnormal" in places:
        bad = images("abnormal")
        masks: list[Path | None] = [None] * len(bad)
        if "masks" in places:
            where, apart = places["abnormal"], _others(places, "masks")
            masks = match_masks(bad, places["masks"], faults, within=where, apart=apart)
        test += [
            Item(f"abnormal/{stem('abnormal', path)}", 1, "abnormal", path, mask)
            for path, mask in zip(bad, masks, strict=True)
        ]
    folders = tuple(places.values())
    return DataSet("folder", name, tuple(train), tuple(test), tuple(faults), folders)


def _others(places: Mapping[str, Path], name: str) -> list[Path]:
    return [path for other, path in places.items() if other != name]


def _check_different(places: Mapping[str, Path]) -> None:
    """Raise a ValueError if two options name one folder, whose images would be of both kinds."""
    for (name, path), (other, same) in combinations(places.items(), 2):
        if path.exists() and same.exists() and path.samefile(same):
            raise ValueError(f"{name} and {other} must be different folders, got {path} and {same}")


def _listed(root: Path, table: Path, seed: int) -> DataSet:
    faults: Faults = []
    found = entries(rows(table, ("path", "label"), faults), root, faults)
    good = [each for each in found if each.defect == "good"]
    bad = [each for each in found if each.defect != "good"]
    if any(each.split for each in found):
        train, test = ([each for each in found if each.split == part] for part in ("train", "test"))
    else:
        if not good and not faults:
            faults.append(ValueError(f"{table} must list good images to train on, got none"))
        train, test = _split(good, bool(bad), seed, table, faults)
        test += bad
    parts = ([_item(root, each) for each in part] for part in (train, test))
    trained, tested = unique(parts, faults)
    return DataSet("folder", root.absolute().name, trained, tested, tuple(faults))


def _item(root: Path, entry: Entry) -> Item:
    name = entry.image.relative_to(root).with_suffix("").as_posix()
    return Item(name, int(entry.defect != "good"), entry.defect, entry.image, entry.mask)


def _split(
    good: list[Any], tested: bool, seed: int, source: Path, faults: Faults
) -> tuple[list[Any], list[Any]]:
    """Split good images into those to train on and, if ``tested``, those to test on."""
    if not tested:
        return good, []
    if len(good) == 1:
        faults.append(
            ValueError(
                f"{source} must hold 2 or more good images, to train on and to test on, got 1"
            )
        )
    train, held_out = hold_out(len(good), np.random.default_rng(seed))
    return [good[i] for i in train], [good[i] for i in held_out]
