"""AUPRO without msflow_ext: with 800 thresholds as in published evaluations, and exact from one sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

MAX_FPR = 0.3


def pro_800(masks: np.ndarray, maps: np.ndarray) -> float:
    """Return AUPRO with 800 thresholds; faster than published evaluations, because regions are labeled once."""
    regions = [region for i, m in enumerate(masks) for region in regions_of(i, m)]
    return area(masks, maps, lambda above: [above[region].mean() for region in regions])


def published(masks: np.ndarray, maps: np.ndarray) -> float:
    """Return AUPRO as in published evaluations, which label the regions of every mask again at every threshold."""
    from scipy import ndimage

    def overlaps(above: np.ndarray) -> Iterator[float]:
        for mask, found in zip(masks, above, strict=True):
            labels, _ = ndimage.label(mask, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
            for k, box in enumerate(ndimage.find_objects(labels), 1):
                yield found[box][labels[box] == k].mean()

    return area(masks, maps, overlaps)


def area(
    masks: np.ndarray, maps: np.ndarray, overlaps: Callable[[np.ndarray], Iterable[float]]
) -> float:
    """Return the area under the mean overlap of all regions, over false-positive rates scaled to 0..1."""
    low, high = maps.min(), maps.max()
    normal = ~masks
    fpr, overlap = [], []
    for threshold in np.arange(low, high, (high - low) / 800, dtype=maps.dtype):
        above = maps > threshold
        overlap.append(np.mean(list(overlaps(above))))
        fpr.append(np.count_nonzero(above & normal) / np.count_nonzero(normal))
    few = np.array(fpr) < MAX_FPR
    x, y = np.array(fpr)[few][::-1], np.array(overlap)[few][::-1]
    return float(np.trapezoid(y, (x - x.min()) / (x.max() - x.min())))


def exact_sweep(masks: np.ndarray, maps: np.ndarray) -> float:
    """Return AUPRO with a threshold at every distinct score, from one sort, cut exactly at the largest rate."""
    regions = [region for i, m in enumerate(masks) for region in regions_of(i, m)]
    share = np.zeros(maps.shape)
    for region in regions:
        share[region] = 1 / (len(region[0]) * len(regions))
    order = np.argsort(-maps.ravel(), kind="stable")
    scores = maps.ravel()[order]
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    fpr = np.append(0, np.cumsum(~masks.ravel()[order])[ends] / np.count_nonzero(~masks))
    overlap = np.append(0, np.cumsum(share.ravel()[order])[ends])
    at_limit = np.interp(MAX_FPR, fpr, overlap)
    few = fpr < MAX_FPR
    x, y = np.append(fpr[few], MAX_FPR), np.append(overlap[few], at_limit)
    return float(np.trapezoid(y, x) / MAX_FPR)


def regions_of(image: int, mask: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Return the indices into ``(N, H, W)`` of each 8-connected region of a mask."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    found = [np.nonzero(labels == k + 1) for k in range(count)]
    return [(np.full(len(rows), image), rows, columns) for rows, columns in found]
