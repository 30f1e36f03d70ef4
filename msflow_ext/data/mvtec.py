"""The layout of MVTec AD: a folder a category, with train, test and ground_truth inside."""

from __future__ import annotations

from pathlib import Path

from .items import DataSet, Item, list_images, match_masks


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read ``train/good``, ``test/KIND`` and ``ground_truth/KIND/NAME_mask`` of a category.

    A mask may also be called as its image is. Without a ``ground_truth`` folder no item has one.

    Args:
        root: the folder of all categories, or with ``category=None`` that of one.
        split_seed: unused; this layout says itself what is trained and tested.

    Raises:
        ValueError: no such category, a folder without images, or a defect without its mask.
        FileNotFoundError: ``train/good`` or ``test`` is missing.
    """
    folder = _category_folder(root, category)
    train = [
        Item(f"train/good/{path.stem}", 0, "good", path)
        for path in list_images(folder / "train" / "good")
    ]
    test = [item for kind in _folders(folder / "test") for item in _tested(folder, kind)]
    if not test:
        raise ValueError(f"{folder / 'test'} holds no folder of images")
    return DataSet("mvtec", folder.absolute().name, tuple(train), tuple(test))


def _tested(folder: Path, kind: str) -> list[Item]:
    images = list_images(folder / "test" / kind)
    if kind == "good":
        return [Item(f"good/{path.stem}", 0, "good", path) for path in images]
    masks: list[Path] | list[None] = [None] * len(images)
    if (folder / "ground_truth").is_dir():
        masks = match_masks(images, folder / "ground_truth" / kind)
    return [
        Item(f"{kind}/{path.stem}", 1, kind, path, mask)
        for path, mask in zip(images, masks, strict=True)
    ]


def _category_folder(root: Path, category: str | None) -> Path:
    if category in _folders(root):
        return root / category
    if category is None and (root / "train").is_dir():
        return root
    categories = [name for name in _folders(root) if (root / name / "train").is_dir()]
    if not categories:
        raise ValueError(
            f"{root} holds no category, that is a folder with train/good and test inside"
            + (f", got category {category!r}" if category is not None else "")
        )
    raise ValueError(f"category of {root} must be one of {', '.join(categories)}, got {category!r}")


def _folders(parent: Path) -> list[str]:
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is not a folder")
    return sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
