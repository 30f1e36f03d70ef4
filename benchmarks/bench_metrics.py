"""Pixel AUROC against scikit-learn's, AUPRO against the method of 800 thresholds (target 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import run_in_pytest
from msflow_ext import metrics
from msflow_ext.bench import Case, Provider

MAX_FPR = 0.3


def test_metric(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    sizes = [(6, 64)] if quick else [(20, 512), (83, 512)]
    return [make(images, side) for images, side in sizes for make in (auroc_case, aupro_case)]


def auroc_case(images: int, side: int) -> Case:
    from sklearn.metrics import roc_auc_score

    def sklearn(masks: np.ndarray, maps: np.ndarray) -> float:
        return float(roc_auc_score(masks.ravel(), maps.ravel()))

    return Case(
        name=f"pixel AUROC {images} images {side} px",
        rows=[10],
        inputs=lambda: masks_and_maps(images, side),
        providers={
            "sklearn": Provider(lambda: sklearn),
            "ours": Provider(lambda: metrics.auroc, 1e-6),
        },
        wanted="sklearn",
        rounds=3,
    )


def aupro_case(images: int, side: int) -> Case:
    return Case(
        name=f"AUPRO {images} images {side} px",
        rows=[10],
        inputs=lambda: masks_and_maps(images, side),
        providers={
            "800 thresholds": Provider(lambda: published, 1e-6, wanted=metrics.pro_800),
            "800 thresholds, regions once": Provider(lambda: pro_800, 1e-6, wanted=metrics.pro_800),
            "ours": Provider(lambda: metrics.aupro, 1e-6),
        },
        wanted=exact_sweep,
        rounds=1,
    )


def pro_800(masks: np.ndarray, maps: np.ndarray) -> float:
    """Threshold by threshold, region by region; kinder than usual: the regions are found only once."""
    regions = [region for i, m in enumerate(masks) for region in regions_of(i, m)]
    return area(masks, maps, lambda above: [above[region].mean() for region in regions])


def published(masks: np.ndarray, maps: np.ndarray) -> float:
    """As published evaluations have it: the regions of every mask are found again at every threshold."""
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
    """Under the mean overlap of all regions, over the false-positive rates below the largest, made to begin at 0."""
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
    """The overlap at every distinct score, from one plain sort; cut at exactly the largest rate."""
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
    """Indices into ``(N, H, W)`` of each 8-connected region of one mask."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    found = [np.nonzero(labels == k + 1) for k in range(count)]
    return [(np.full(len(rows), image), rows, columns) for rows, columns in found]


def masks_and_maps(images: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random maps that rise in round defects, up to three on every other image."""
    rng = np.random.default_rng(0)
    masks = np.zeros((images, side, side), bool)
    rows, columns = np.indices((side, side))
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            (row, column), radius = rng.uniform(0, side, 2), rng.uniform(0.03, 0.1) * side
            mask |= np.hypot(rows - row, columns - column) < radius
    coarse = torch.from_numpy(rng.standard_normal((images, 1, side // 8, side // 8)))
    smooth = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)[:, 0]
    noise = 0.1 * rng.standard_normal(masks.shape)
    return masks, (smooth.numpy() + noise + 1.5 * masks).astype(np.float32)
