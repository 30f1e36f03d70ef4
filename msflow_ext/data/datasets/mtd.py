"""MTD, magnetic tile defects: gray tiles of many sizes, each beside its mask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from msflow_ext.data.dataset import DataSet, Faults, Item, hold_out, list_images, match_masks

KINDS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
SPLITS = Path(__file__).with_name("mtd_splits.json")


def read(root: Path, category: str | None = None, split_seed: int = 0) -> DataSet:
    """Read ``MT_Free/Imgs`` and ``MT_KIND/Imgs``: ``NAME.jpg`` is a tile, ``NAME.png`` its mask.

    A seeded 80% of the free tiles are trained on; the others and all defects are tested. There is
    no published split, so report the mean of the seeds 0 to 4. Their splits of all 952 free tiles are
    recorded in ``mtd_splits.json``, and :attr:`DataSet.split` identifies any split.

    Args:
        root: the folder with ``MT_Free`` and the folders of defects.
        category: None, because this layout has no categories.
        split_seed: seed of the split of free tiles.

    Raises:
        ValueError: a category is given.

    References:
        Huang et al., "Surface defect saliency of magnetic tile", The Visual Computer 36 (2020).
    """
    if category is not None:
        raise ValueError(f"layout mtd has no categories, got category {category!r}")
    faults: Faults = []
    free = list_images(root / "MT_Free" / "Imgs", faults, (".jpg",))
    trained, held_out = split(len(free), split_seed)
    train = [Item(f"train/good/{free[i].stem}", 0, "good", free[i]) for i in trained]
    test = [Item(f"good/{free[i].stem}", 0, "good", free[i]) for i in held_out]
    for kind in map(str.lower, KINDS):
        folder = root / f"MT_{kind.capitalize()}" / "Imgs"
        tiles = list_images(folder, faults, (".jpg",))
        masks = match_masks(tiles, folder, faults, (".png",)) if tiles else []
        test += [
            Item(f"{kind}/{tile.stem}", 1, kind, tile, mask)
            for tile, mask in zip(tiles, masks, strict=True)
        ]
    return DataSet("mtd", "tiles", tuple(train), tuple(test), tuple(faults))


def categories(root: Path) -> list[str]:
    """Return no categories: all tiles are of one kind."""
    return []


def split(tiles: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the free tiles, sorted by name, to train and test on, as recorded if possible."""
    recorded = json.loads(SPLITS.read_text())
    if tiles != recorded["tiles"] or seed >= len(recorded["tested"]):
        return hold_out(tiles, np.random.default_rng(seed))
    tested = recorded["tested"][seed]
    return sorted(set(range(tiles)).difference(tested)), tested
