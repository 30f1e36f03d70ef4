"""Check every image and mask of a data set before training."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from msflow_ext.choices import Fit
from msflow_ext.data.dataset import DataSet, Item, unread
from msflow_ext.data.images import Images, placed
from msflow_ext.data.masks import Mask, check_size, decode_mask, resize
from msflow_ext.data.pictures import decode, source_name, to_rgb
from msflow_ext.data.walk import few, summary
from msflow_ext.text_table import one_line, text_table

DARK = 64  # of 255: 16-bit images that are all darker hold values of fewer bits


@dataclass(frozen=True)
class Report:
    """The contents of a data set and what is wrong with it. ``str(report)`` is a table.

    Attributes:
        name, category, split: those of the :class:`DataSet`.
        counts: number of images by kind of defect,
            ``{"train": {"good": 209}, "test": {"good": 20, ...}}``.
        sizes: number of images by ``(width, height)`` in pixels.
        modes: number of images by the Pillow mode of their pixels, such as ``L`` or ``RGB``.
        faults: sentences about errors that prevent training or testing.
        warnings: sentences about problems that may spoil the results.

    Examples:
        >>> report = Report("mine", "part", "0" * 12, {"train": {"good": 9}}, {(8, 8): 9}, {"L": 9}, (), ())
        >>> print(report)
        mine part, split 000000000000
        images  good
        train      9
        sizes  8x8 (9)
        modes  L (9)
        faults: 0, warnings: 0
    """

    name: str
    category: str
    split: str
    counts: dict[str, dict[str, int]]
    sizes: dict[tuple[int, int], int]
    modes: dict[str, int]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(kind for part in self.counts.values() for kind in part))
        counts = [("images", *kinds)]
        for name, part in self.counts.items():
            counts.append((name, *(str(part.get(kind, 0)) for kind in kinds)))
        sizes = {f"{width}x{height}": n for (width, height), n in self.sizes.items()}
        pixels = [
            (title, few([f"{k} ({n})" for k, n in found.items()]))
            for title, found in (("sizes", sizes), ("modes", self.modes))
        ]
        lines = [f"{self.name} {self.category}, split {self.split}"]
        lines += [*text_table(counts), *text_table(pixels, left=2)]
        lines += [f"fault: {sentence}" for sentence in self.faults]
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        lines.append(f"faults: {len(self.faults)}, warnings: {len(self.warnings)}")
        return "\n".join(lines)


def check_dataset(
    dataset: DataSet, workers: int = 2, *, size: int | None = None, fit: Fit = "resize"
) -> Report:
    """Decode every image and mask of a data set and report faults and warnings.

    Faults are:

    - the faults of the reader;
    - no image to train on;
    - an image or a mask that cannot be decoded;
    - a mask whose size differs from that of its image.

    Warnings are:

    - images with the same pixels;
    - an empty mask of a defective image, or a mask of a good image that is not empty;
    - an unusual encoding: several images in a file, dark 16-bit images, soft or inverted masks;
    - a mask that EXIF does not rotate as it does its image;
    - test images of one class only, and defects without masks;
    - files and folders that are not read.

    Args:
        dataset: a data set, opened with ``strict=False`` to report all of its faults.
        workers: number of threads that decode.
        size, fit: those of the model, as for :class:`msflow_ext.data.Images`. With a size, masks
            with regions smaller than a pixel at that size are warned of.

    Raises:
        ValueError: ``size`` or ``fit`` is invalid.

    Examples:
        >>> from msflow_ext.data import DataSet, Item, check_dataset
        >>> train = (Item("train/good/0", 0, "good", np.zeros((8, 8), np.uint8)),)
        >>> check_dataset(DataSet("mine", "part", train, test=())).warnings
        ('there are no images to test on, so no metrics will be computed',)
    """
    items = (*dataset.train, *dataset.test)
    if size is not None:
        Images(items, size, fit)  # raises if size or fit is invalid
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(lambda item: _inspect(item, size, fit), items))
    faults = [str(fault) for fault in dataset.faults]
    faults += [] if dataset.train else ["there are no images to train on"]
    warnings = list(_one_class(dataset.test))
    for each in seen:
        faults += each.faults
        warnings += each.warnings
    warnings += _unusual(items, seen, size)
    warnings += _duplicates(dataset, (each.digest for each in seen))
    left = unread(dataset)
    warnings += [summary(left)] if left else []
    parts = {"train": dataset.train, "test": dataset.test}
    return Report(
        dataset.name,
        dataset.category,
        dataset.split,
        {name: dict(Counter(item.defect for item in part)) for name, part in parts.items()},
        dict(Counter(each.size for each in seen if each.size).most_common()),
        dict(Counter(each.mode for each in seen if each.mode).most_common()),
        tuple(map(one_line, faults)),
        tuple(map(one_line, warnings)),
    )


@dataclass
class _Seen:
    size: tuple[int, int] | None = None
    mode: str = ""
    digest: bytes | None = None
    images: int = 1  # in the file
    brightest: int | None = None  # level in 0..255 of a 16-bit image
    # The rest concerns the mask:
    soft: bool = False
    inverted: bool = False
    unrotated: bool = False
    lost: int = 0  # regions
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _inspect(item: Item, size: int | None, fit: Fit) -> _Seen:
    seen, picture = _Seen(), None
    try:
        picture = decode(item.image)
        pixels = to_rgb(picture, source_name(item.image))
    except (OSError, TypeError, ValueError) as error:
        seen.faults.append(str(error))
    else:
        seen.size, seen.mode = picture.pixels.size, picture.pixels.mode
        seen.digest = hashlib.sha256(repr(seen.size).encode() + pixels.tobytes()).digest()
        seen.images = picture.images
        seen.brightest = np.asarray(pixels).max().item() if picture.deep else None
    if item.mask is not None:
        try:
            mask = decode_mask(item.mask)
            if picture is not None:
                check_size(mask, item.mask, picture, item.image)
            _check_mask(item, mask, seen)
            seen.unrotated = picture is not None and picture.turned and not mask.turned
            if size is not None:
                height, width = mask.marks.shape
                rows, columns = placed(width, height, size, fit)
                extent = rows.stop - rows.start, columns.stop - columns.start
                seen.lost = resize(mask.marks, *extent)[1]
        except (OSError, TypeError, ValueError) as error:
            seen.faults.append(str(error))
    return seen


def _check_mask(item: Item, mask: Mask, seen: _Seen) -> None:
    share = mask.marks.mean()
    if item.label == 1 and not share:
        seen.warnings.append(f"the mask of the defective image {item.name} is empty")
    if item.label == 0 and share:
        seen.warnings.append(f"the mask of the good image {item.name} is not empty")
    seen.soft, seen.inverted = mask.soft, item.label == 1 and bool(share > 0.5)


def _unusual(items: Sequence[Item], seen: Sequence[_Seen], size: int | None) -> Iterator[str]:
    """Yield a sentence for each unusual encoding that was found, with the names of the images."""
    deep = [each.brightest for each in seen if each.brightest is not None]
    brightest = max(deep, default=255)
    several = [
        f"{source_name(item.image)} ({each.images})"
        for item, each in zip(items, seen, strict=True)
        if each.images > 1
    ]
    if several:
        yield f"{len(several)} files hold several images, of which the first is read: {few(several)}"
    for sentence, flag in (
        (
            f"images have 16 bits (65535 is white) and reach at most {brightest / 255:.1%} of white",
            lambda s: s.brightest is not None and brightest < DARK,
        ),
        (
            "masks have soft outlines, which are cut at half of the mask's largest level",
            lambda s: s.soft,
        ),
        (
            "masks mark more than half of their image; black must mean normal",
            lambda s: s.inverted,
        ),
        (
            "images are rotated by EXIF and their masks are not; a mask must fit the rotated image",
            lambda s: s.unrotated,
        ),
        (f"masks have regions that are smaller than a pixel at size {size}", lambda s: s.lost),
    ):
        names = [item.name for item, each in zip(items, seen, strict=True) if flag(each)]
        if names:
            yield f"{len(names)} {sentence}: {few(names)}"


def _one_class(test: Sequence[Item]) -> Iterator[str]:
    labels = {item.label for item in test}
    if not test:
        yield "there are no images to test on, so no metrics will be computed"
    elif labels == {0}:
        yield "all test images are good, so no metrics will be computed"
    elif labels == {1}:
        yield "all test images are defective, so no image metrics will be computed"
    defects = [item for item in test if item.label == 1]
    bare = [item.name for item in defects if item.mask is None]
    if bare:
        which = f" ({few(bare)})" if len(bare) < len(defects) else ""
        part = f"{len(bare)} of {len(defects)}"
        yield f"{part} defects have no mask{which}, so no pixel metrics will be computed"


def _duplicates(dataset: DataSet, digests: Iterable[bytes | None]) -> Iterator[str]:
    items = [("train", item) for item in dataset.train] + [("test", item) for item in dataset.test]
    groups: dict[bytes, list[tuple[str, Item]]] = defaultdict(list)
    for each, digest in zip(items, digests, strict=True):
        if digest:
            groups[digest].append(each)
    for same in (group for group in groups.values() if len(group) > 1):
        parts = " and ".join(dict.fromkeys(part for part, _ in same))
        names = few([item.name for _, item in same])
        yield f"{len(same)} images with the same pixels in {parts}: {names}"
