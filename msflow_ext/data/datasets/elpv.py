"""ELPV: electroluminescence images of solar cells, from the package ``elpv-dataset``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from msflow_ext.data.dataset import DataSet, Item, hold_out

CATEGORIES = {"mono": ("mono",), "poly": ("poly",), "both": ("mono", "poly")}


def read(category: str | None, split_seed: int = 0) -> DataSet:
    """Read mono- or polycrystalline cells: 300x300 gray images, without masks.

    Experts gave each of the 2,624 cells a probability of being defective. Cells with probability 0
    are good: a seeded 80% of each type are trained on, and the others are tested. Cells with
    probability 1 are defective. Doubtful cells, with 1/3 and 2/3, are left out. Cells of one solar
    module can be on both sides of the split. The images are licensed CC BY-NC-SA 4.0.

    Args:
        category: ``mono``, ``poly`` or ``both``.
        split_seed: seed of the split of good cells.

    Raises:
        ValueError: the category does not exist.
        ModuleNotFoundError: ``elpv-dataset`` is not installed.

    References:
        Deitsch et al., "Automatic classification of defective photovoltaic module cells in
        electroluminescence images", Solar Energy 185 (2019).
    """
    if category not in CATEGORIES:
        raise ValueError(f"category of elpv must be one of mono, poly, both, got {category!r}")
    folder = _folder()
    cells: dict[tuple[str, float], list[Path]] = {}
    for line in (folder / "labels.csv").read_text().splitlines():
        path, probability, kind = line.split()
        cells.setdefault((kind, float(probability)), []).append(folder / path)

    rng = np.random.default_rng(split_seed)
    train: list[Item] = []
    test: list[Item] = []
    for kind in (
        "mono",
        "poly",
    ):  # draws for both, so that each type has the same split in every category
        good, bad = cells[kind, 0.0], cells[kind, 1.0]
        trained, held_out = hold_out(len(good), rng)
        if kind in CATEGORIES[category]:
            train += [Item(f"train/good/{good[i].stem}", 0, "good", good[i]) for i in trained]
            test += [Item(f"good/{good[i].stem}", 0, "good", good[i]) for i in held_out]
            test += [Item(f"defective/{path.stem}", 1, "defective", path) for path in bad]
    return DataSet("elpv", category, tuple(train), tuple(test))


def categories() -> list[str]:
    """Return the categories of `read`."""
    return list(CATEGORIES)


def _folder() -> Path:
    try:
        import elpv_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data elpv needs the package elpv-dataset: pip install msflow-ext[demo]"
        ) from error
    return Path(elpv_dataset.__path__[0]) / "data"
