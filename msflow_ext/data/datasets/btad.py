"""BTAD, the beanTech set: the tree of MVTec AD, whose images are ``ok`` or ``ko``."""

from __future__ import annotations

from pathlib import Path

from msflow_ext.data.dataset import DataSet
from msflow_ext.data.datasets.mvtec import categories, read_tree

__all__ = ["categories", "read"]


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read ``train/ok``, ``test/ok``, ``test/ko`` and ``ground_truth/ko`` of ``01``, ``02`` or ``03``.

    Images and masks are ``.bmp`` or ``.png`` and may differ in that.

    Args:
        root: the folder of all categories, or with ``category=None`` that of one.
        split_seed: unused; this layout says itself what is trained and tested.

    Raises:
        ValueError: no such category.
    Source: Mishra et al., "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and
        Localization", ISIE 2021.
    """
    return read_tree("btad", root, category, good="ok")
