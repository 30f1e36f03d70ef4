"""Textures: photographs from scikit-image, with seeded defects and exact masks."""

from __future__ import annotations

import numpy as np

from msflow_ext.data import synthetic
from msflow_ext.data.dataset import DataSet, Item

CATEGORIES = ("brick", "grass", "gravel")
TRAIN_ROWS = slice(0, 304)
TEST_ROWS = slice(320, 512)  # no pixel is both trained on and tested


def read(
    category: str | None,
    split_seed: int = 0,
    *,
    size: int = 192,
    train: int = 96,
    good: int = 40,
    defects: int = 12,
) -> DataSet:
    """Cut crops from a 512x512 gray CC0 photograph, with random mirroring and brightness.

    Training crops come from the upper rows, test crops from the lower rows. Defects are those of
    `synthetic`: scar, patch, blur, blob and perlin (flecks of the other two textures).

    Args:
        category: ``brick``, ``grass`` or ``gravel``.
        split_seed: seed of the crops and the defects.
        size: side of a crop in pixels, at most 192.
        train: number of good crops to train on.
        good: number of good crops to test on.
        defects: number of test crops with each kind of defect.

    Raises:
        ValueError: the category does not exist, or ``size`` is out of range.
        ModuleNotFoundError: scikit-image is not installed.
    """
    if category not in CATEGORIES:
        names = ", ".join(CATEGORIES)
        raise ValueError(f"category of textures must be one of {names}, got {category!r}")
    if not 1 <= size <= 192:
        raise ValueError(f"size must be in 1..192, got {size}")
    photo = _photo(category)
    others = [_photo(name) for name in CATEGORIES if name != category]
    rng = np.random.default_rng([split_seed, CATEGORIES.index(category)])

    def crop(rows: slice) -> np.ndarray:
        return _lit(_cut(photo[rows], size, rng), rng)

    def perlin(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return synthetic.perlin(image, rng, _cut(others[rng.integers(2)], size, rng))

    kinds = {
        "scar": synthetic.scar,
        "patch": synthetic.patch,
        "blur": synthetic.blur,
        "blob": synthetic.blob,
        "perlin": perlin,
    }
    trained = [Item(f"train/good/{i:03}", 0, "good", crop(TRAIN_ROWS)) for i in range(train)]
    tested = [Item(f"good/{i:03}", 0, "good", crop(TEST_ROWS)) for i in range(good)]
    for kind, defect in kinds.items():
        for i in range(defects):
            image, mask = synthetic.draw(defect, crop(TEST_ROWS), rng)
            tested.append(Item(f"{kind}/{i:03}", 1, kind, image, mask))
    return DataSet("textures", category, tuple(trained), tuple(tested))


def categories() -> list[str]:
    """Return the categories of `read`."""
    return list(CATEGORIES)


def _cut(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    row, column = (rng.integers(0, extent - size + 1) for extent in photo.shape)
    crop = photo[row : row + size, column : column + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _lit(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the contrast by up to 8%, and the brightness by up to 8 gray levels."""
    mean = crop.mean()
    lit = mean + rng.uniform(-8, 8) + rng.uniform(0.92, 1.08) * (crop - mean)
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)


def _photo(category: str) -> np.ndarray:
    try:
        import skimage.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data textures needs the package scikit-image: pip install msflow-ext[demo]"
        ) from error
    return getattr(skimage.data, category)()
