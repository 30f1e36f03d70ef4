"""BTAD (beanTech): the layout of MVTec AD with the folders ``ok`` and ``ko``."""

from __future__ import annotations

from pathlib import Path

from msflow_ext.data.dataset import DataSet
from msflow_ext.data.datasets.mvtec import categories, read_tree

__all__ = ["categories", "read"]


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read ``train/ok``, ``test/ok``, ``test/ko`` and ``ground_truth/ko`` of ``01``, ``02`` or ``03``.

    Images and masks are ``.bmp`` or ``.png``; a mask may have another suffix than its image.

    Args:
        root: the folder of all categories, or of one category with ``category=None``.
        split_seed: unused, because this layout has its own test images.

    Raises:
        ValueError: the category does not exist.

    References:
        Mishra et al., "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and
        Localization", ISIE 2021.
    """
    return read_tree("btad", root, category, good="ok")
