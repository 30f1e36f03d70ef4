"""The plainest layout: a folder of normal images, and perhaps one of abnormal ones with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .items import DataSet, Item, hold_out, list_images, match_masks


def read(
    root: Path | None,
    category: str | None = None,
    split_seed: int = 0,
    *,
    normal: str | Path | None = None,
    abnormal: str | Path | None = None,
    masks: str | Path | None = None,
) -> DataSet:
    """Read ``normal``, ``abnormal`` and ``masks``, which are taken relative to ``root``.

    If none of the three is given, the folders of these names inside ``root`` are, where they
    exist. Without abnormal images all normal ones train and nothing is tested; with them, a
    seeded 80% of the normal ones train and the others are tested. A mask is called as its image
    is, or ``NAME_mask``.

    Raises:
        ValueError: a folder without images, an abnormal image without its mask when there is a
            folder of masks, masks without abnormal images, or a category, which there is not.
        FileNotFoundError: a folder is missing.
    """
    if category is not None:
        raise ValueError(f"layout folder has no categories, got category {category!r}")
    base = root if root is not None else Path()
    if root is not None and normal is None and abnormal is None and masks is None:
        normal = "normal"
        abnormal = "abnormal" if (root / "abnormal").exists() else None
        masks = "masks" if (root / "masks").exists() else None
    if normal is None:
        raise ValueError("layout folder needs normal, a folder of good images")
    if masks is not None and abnormal is None:
        raise ValueError(f"masks {base / masks} belong to abnormal images, of which there are none")

    good = list_images(base / normal)
    name = (root if root is not None else base / normal).absolute().name
    if abnormal is None:
        return DataSet("folder", name, tuple(_train(path) for path in good), ())
    if len(good) < 2:
        raise ValueError(f"{base / normal} holds one image, too few to train on some and test some")

    train, held_out = hold_out(len(good), np.random.default_rng(split_seed))
    bad = list_images(base / abnormal)
    marks = match_masks(bad, base / masks) if masks is not None else [None] * len(bad)
    test = [Item(f"good/{good[i].stem}", 0, "good", good[i]) for i in held_out] + [
        Item(f"abnormal/{path.stem}", 1, "abnormal", path, mask)
        for path, mask in zip(bad, marks, strict=True)
    ]
    return DataSet("folder", name, tuple(_train(good[i]) for i in train), tuple(test))


def _train(path: Path) -> Item:
    return Item(f"train/good/{path.stem}", 0, "good", path)
