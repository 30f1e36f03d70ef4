"""Pixel AUROC and AUPRO, compared with scikit-learn and with the method of 800 thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.aupro import exact_sweep, pro_800, published
from benchmarks.harness import run_in_pytest
from msflow_ext import metrics
from msflow_ext.bench import Case, Provider


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
        inputs=lambda: masks_and_maps(images, side),
        providers={
            "sklearn": Provider(lambda: sklearn),
            "ours": Provider(lambda: metrics.auroc, 1e-6),
        },
        expected="sklearn",
        rounds=3,
    )


def aupro_case(images: int, side: int) -> Case:
    return Case(
        name=f"AUPRO {images} images {side} px",
        inputs=lambda: masks_and_maps(images, side),
        providers={
            "800 thresholds": Provider(lambda: published, 1e-6, expected=metrics.pro_800),
            "800 thresholds, regions once": Provider(
                lambda: pro_800, 1e-6, expected=metrics.pro_800
            ),
            "ours": Provider(lambda: metrics.aupro, 1e-6),
        },
        expected=exact_sweep,
        rounds=1,
    )


def masks_and_maps(images: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return masks with up to three round defects on every other image, and smooth random maps that rise there."""
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
