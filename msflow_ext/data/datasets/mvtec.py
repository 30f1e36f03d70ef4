"""MVTec AD: one folder per category, with train, test and ground_truth inside."""

from __future__ import annotations

from pathlib import Path

from msflow_ext.data.dataset import DataSet, Faults, Item, list_images, match_masks, subfolders


def read(root: Path, category: str | None, split_seed: int = 0) -> DataSet:
    """Read ``train/good``, ``test/KIND`` and ``ground_truth/KIND/NAME_mask`` of a category.

    A mask may also have the name of its image. Without a ``ground_truth`` folder there are no masks.
    MVTec LOCO AD, where a mask is a folder of files, is read too. So is MVTec AD 2, where
    ``test_public`` replaces ``test`` and holds the ``ground_truth``. ``validation`` and the private
    test images, which have no labels, are not read.

    Args:
        root: the folder of all categories, or of one category with ``category=None``.
        category: the name of a folder in ``root``.
        split_seed: unused, because this layout has its own test images.

    Raises:
        ValueError: the category does not exist.

    References:
        Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly
        Detection", CVPR 2019.
    """
    return read_tree("mvtec", root, category)


def categories(root: Path) -> list[str]:
    """Return the folders with ``train`` or ``test`` inside; none if ``root`` is a category itself."""
    parts = ("train", "test")
    return [name for name in subfolders(root) if any((root / name / p).is_dir() for p in parts)]


def read_tree(layout: str, root: Path, category: str | None, good: str = "good") -> DataSet:
    """Read a tree like that of MVTec AD, with ``good`` as the name of the folders of normal images."""
    faults: Faults = []
    folder = _category_folder(root, category, good)
    train = list_images(folder / "train" / good, faults)
    tests, truth = folder / "test", folder / "ground_truth"
    if not tests.is_dir() and (folder / "test_public").is_dir():
        tests, truth = folder / "test_public", folder / "test_public" / "ground_truth"

    test: list[Item] = []
    kinds = [kind for kind in _folders(tests, faults) if tests / kind != truth]
    for kind in kinds:
        images = list_images(tests / kind, faults)
        masks: list[Path | None] = [None] * len(images)
        if kind != good and truth.is_dir():
            masks = match_masks(images, truth / kind, faults)
        defect = "good" if kind == good else kind
        test += [
            Item(f"{defect}/{path.stem}", int(kind != good), defect, path, mask)
            for path, mask in zip(images, masks, strict=True)
        ]
    if tests.is_dir() and not kinds:
        faults.append(ValueError(f"{tests} holds no folder of images"))
    lost = set(_folders(truth, faults) if truth.is_dir() else ()) - {*kinds, good}
    faults += [
        ValueError(f"masks {truth / kind} have no images: {tests / kind} is not a folder")
        for kind in sorted(lost)
    ]
    items = tuple(Item(f"train/good/{path.stem}", 0, "good", path) for path in train)
    folders = tuple(folder / name for name in subfolders(folder))
    return DataSet(layout, folder.absolute().name, items, tuple(test), tuple(faults), folders)


def _folders(parent: Path, faults: Faults) -> list[str]:
    try:
        return subfolders(parent)
    except FileNotFoundError as error:
        faults.append(error)
        return []


def _category_folder(root: Path, category: str | None, good: str) -> Path:
    if category in subfolders(root):
        return root / category
    if category is None and (root / "train").is_dir():
        return root
    names = categories(root)
    if not names:
        raise ValueError(
            f"{root} must hold categories, folders with train/{good} and test inside"
            + (f", got category {category!r}" if category is not None else "")
        )
    raise ValueError(f"category of {root} must be one of {', '.join(names)}, got {category!r}")
