"""Properties of the metrics: they equal scikit-learn, golden values and sweeps over every threshold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from msflow_ext import metrics, ops

GOLDEN = Path(__file__).parent / "golden"
IMAGE_METRICS = (metrics.auroc, metrics.average_precision, metrics.f1_max)
ALL_METRICS = (*IMAGE_METRICS, metrics.aupro, metrics.aupimo, metrics.pro_800)
seeds = st.integers(0, 2**32 - 1)
limits = st.sampled_from((0.01, 0.05, 0.3, 0.7, 1.0))


def by_name(metric) -> str:
    return metric.__name__


def tied_scores(seed: int, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of both classes and float32 scores, most of which are tied."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) < rng.integers(1, size))
    return labels, (rng.integers(-4, 5, size) / 2 + labels).astype(np.float32)


def tied_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 7, 6)) < 0.2
    masks[0, 0, :2] = True, False
    masks[3] = False
    return masks, (rng.integers(-4, 5, masks.shape) / 2 + masks).astype(np.float32)


def regions_of(masks: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return the defects, each with the index of its image."""
    regions = []
    for i, mask in enumerate(masks):
        numbered = ndimage.label(mask, np.ones((3, 3)))[0]  # pyright: ignore[reportIndexIssue]
        regions += [(i, numbered == k) for k in range(1, numbered.max() + 1)]
    return regions


def swept_aupro(masks: np.ndarray, maps: np.ndarray, max_fpr: float) -> float:
    regions = regions_of(masks)
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        x.append(found[~masks].mean())
        y.append(float(np.mean([found[i][region].mean() for i, region in regions])))
    area = 0.0
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        if x1 > max_fpr:
            y1 = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            x1 = max_fpr
        area += (x1 - x0) * (y0 + y1) / 2
        if x1 == max_fpr:
            break
    return area / max_fpr


def swept_pro_800(masks: np.ndarray, maps: np.ndarray) -> float:
    low, high = maps.min(), maps.max()
    x, y = [], []
    for threshold in np.arange(low, high, (high - low) / maps.dtype.type(800), dtype=maps.dtype):
        found = maps > threshold
        x.append(found[~masks].mean())
        y.append(np.mean([found[i][region].mean() for i, region in regions_of(masks)]))
    kept = [(a, b) for a, b in zip(x, y, strict=True) if a < 0.3]
    x, y = (np.array(each) for each in zip(*kept[::-1], strict=True))
    x = (x - x.min()) / (x.max() - x.min())
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2)


def swept_aupimo(masks: np.ndarray, maps: np.ndarray, bounds: tuple[float, float]) -> list[float]:
    """Integrate the curves at every threshold numerically, for the defective images."""
    defective = masks.any((1, 2))
    found = [maps >= t for t in (np.inf, *np.unique(maps)[::-1])]
    fpr = np.array([f[~defective].mean() for f in found])
    x = np.linspace(np.log(bounds[0]), np.log(bounds[1]), 200_001)
    areas = []
    for i in np.flatnonzero(defective):
        tpr = np.array([f[i][masks[i]].mean() for f in found])
        areas.append(np.interp(np.exp(x), fpr + 1e-12 * np.arange(fpr.size), tpr).mean())
    return areas


def swept_f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    return max(sklearn_metrics.f1_score(labels, scores >= t) for t in np.unique(scores))


@pytest.mark.parametrize("case", [0, 1], ids=("smooth", "ties"))
def test_golden_values_are_reproduced(case):
    expected = json.loads((GOLDEN / "metrics.json").read_text())["cases"][case]
    expected["pro_800"] = next(value for key, value in expected.items() if key.startswith("pro_"))
    arrays = load_file(GOLDEN / "metrics.safetensors")
    label, score, mask, maps = (arrays[f"m{case}.{k}"] for k in ("label", "score", "mask", "maps"))
    ours = {
        "det_auroc": metrics.auroc(label, score),
        "loc_auroc": metrics.auroc(mask, maps),
        "aupro30_exact": metrics.aupro(mask, maps),
        "pro_800": metrics.pro_800(mask, maps),
    }
    assert ours == pytest.approx({key: expected[key] / 100 for key in ours}, abs=1e-9)


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_image_metrics_equal_scikit_learn_on_ties(seed):
    labels, scores = tied_scores(seed)
    auroc = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics.auroc(labels, scores) == pytest.approx(auroc, abs=1e-12)
    precision = sklearn_metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(labels, scores) == pytest.approx(precision, abs=1e-12)
    assert metrics.f1_max(labels, scores) == pytest.approx(swept_f1_max(labels, scores), abs=1e-12)


@given(seeds, limits)
@settings(max_examples=50, deadline=None)
def test_aupro_equals_a_sweep_over_every_threshold(seed, max_fpr):
    masks, maps = tied_maps(seed)
    assert metrics.aupro(masks, maps, max_fpr) == pytest.approx(
        swept_aupro(masks, maps, max_fpr), abs=1e-12
    )


@given(seeds, st.sampled_from(((1e-3, 1e-1), (0.02, 0.3), (0.2, 1.0))))
@settings(max_examples=25, deadline=None)
def test_aupimo_equals_a_sweep_over_every_threshold(seed, bounds):
    masks, maps = tied_maps(seed)
    maps -= masks  # both classes on the same few values, so that lines slope
    got = metrics.aupimo_per_image(masks, maps, bounds)
    assert np.isnan(got[~masks.any((1, 2))]).all()
    got = got[masks.any((1, 2))]
    assert got == pytest.approx(swept_aupimo(masks, maps, bounds), abs=2e-5)
    assert metrics.aupimo(masks, maps, bounds) == pytest.approx(got.mean())


def test_aupimo_equals_the_published_code_except_for_its_uniform_thresholds():
    rng, masks = np.random.default_rng(0), np.zeros((5, 64, 64), bool)
    for i in range(3):
        masks[i, 10 : 30 + 5 * i, 20:50] = True
    shift = np.array([1.0, 1.5, 2.5, 0, 0])[:, None, None]
    maps = (rng.standard_normal(masks.shape) + masks * shift).astype(np.float32)
    expected = [
        0.1979461,
        0.3618769,
        0.7567894,
        np.nan,
        np.nan,
    ]  # anomalib 2.7.0, 300,000 thresholds
    ours = metrics.aupimo_per_image(masks, maps, (1e-2, 1e-1))
    assert ours == pytest.approx(expected, abs=5e-4, nan_ok=True)


def test_constant_maps_have_the_aupimo_of_random_maps():
    masks = np.zeros((2, 50, 50), bool)
    masks[0, 0] = True
    chance = (1e-4 - 1e-5) / np.log(10)
    assert metrics.aupimo(masks, np.zeros(masks.shape)) == pytest.approx(chance)


def test_the_area_under_a_curve_equals_the_metric():
    masks, maps = tied_maps(3)
    for curve, metric in ((metrics.roc_curve, metrics.auroc), (metrics.pro_curve, metrics.aupro)):
        x, y = curve(masks, maps)
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        limit = 0.3 if metric is metrics.aupro else 1.0
        assert metrics.area_up_to(limit, x, y) == pytest.approx(metric(masks, maps), abs=1e-12)


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_rounding_never_lifts_a_perfect_overlap_above_one(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 40, 40)) < rng.uniform(0.05, 0.5)
    masks[0] = False
    maps = masks + 0.5 * rng.random(masks.shape)
    for max_fpr in (0.05, 0.3, 1.0):
        assert 1 - 1e-12 < metrics.aupro(masks, maps, max_fpr) <= 1
    assert 1 - 1e-12 < metrics.aupimo(masks, maps) <= 1


def test_a_million_pixels_equal_scikit_learn_and_the_sweep(each_backend):
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 500, 500), bool)
    for image, row, column in rng.integers(0, (3, 450, 450), (9, 3)):
        masks[image, row : row + 50, column : column + 30] = True
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)
    labels, scores = masks.ravel(), maps.ravel()
    auroc = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics.auroc(masks, maps) == pytest.approx(auroc, abs=1e-12)
    precision = sklearn_metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(masks, maps) == pytest.approx(precision, abs=1e-12)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    f1 = np.max(2 * precision * recall / (precision + recall + 1e-300))
    assert metrics.f1_max(masks, maps) == pytest.approx(f1, abs=1e-12)
    coarse = np.round(4 * maps)
    assert metrics.aupro(masks, coarse) == pytest.approx(swept_aupro(masks, coarse, 0.3), abs=1e-12)


@pytest.mark.parametrize("metric", ALL_METRICS, ids=by_name)
def test_kernel_and_reference_are_equal_bit_for_bit(native, metric):
    masks, maps = tied_maps(2)
    value = metric(masks, maps)
    with ops.backend("reference"):
        assert metric(masks, maps) == value


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_images_does_not_matter(seed):
    masks, maps = tied_maps(seed)
    order = np.random.default_rng(seed).permutation(len(masks))
    for metric in ALL_METRICS:
        try:
            value = metric(masks, maps)
        except ValueError:  # these maps have too few low rates
            assert metric is metrics.pro_800
        else:
            assert metric(masks[order], maps[order]) == pytest.approx(value, abs=1e-12)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_an_increasing_transform_of_the_scores_does_not_matter(seed):
    masks, maps = tied_maps(seed)
    for metric in (*IMAGE_METRICS, metrics.aupro, metrics.aupimo):
        assert metric(masks, np.exp(maps) - 50) == metric(masks, maps)


@pytest.mark.parametrize("metric", ALL_METRICS, ids=by_name)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64],
    ids=str,
)
def test_every_dtype_of_array_or_tensor_gives_the_same_value(metric, dtype):
    masks, maps = tied_maps(0)
    expected = metric(masks, 2 * maps)
    scores = torch.from_numpy(2 * maps).to(dtype)
    assert metric(torch.from_numpy(masks), scores) == pytest.approx(expected, abs=1e-12)
    assert metric(masks.astype(np.int64), scores.tolist()) == pytest.approx(expected, abs=1e-12)
    with_gradient = scores.double().requires_grad_()
    assert metric(masks.astype(np.float32), with_gradient) == pytest.approx(expected, abs=1e-12)


def test_scores_in_float64_are_compared_in_float64():
    scores = 1 + 1e-12 * torch.arange(4, dtype=torch.float64)
    for held in (scores, scores.numpy(), scores.tolist()):
        assert metrics.auroc([0, 1, 0, 1], held) == 0.75


def test_constant_scores_have_the_metrics_of_random_scores():
    labels = np.arange(10) < 3
    assert metrics.auroc(labels, np.zeros(10)) == 0.5
    assert metrics.average_precision(labels, np.zeros(10)) == 0.3
    assert metrics.aupro(labels.reshape(1, 2, 5), np.zeros((1, 2, 5))) == pytest.approx(0.15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_zeros_tie_and_infinities_are_extremes(dtype):
    labels = [0, 1, 0, 1, 0, 1]
    scores = np.array([-np.inf, -0.0, 0.0, np.inf, np.inf, 1e-30], dtype)
    assert metrics.auroc(labels, scores) == (1.5 + 2.5 + 2) / 9


def test_perfect_maps_score_one_and_inverted_maps_zero():
    masks, _ = tied_maps(1)
    for metric in IMAGE_METRICS:
        assert metric(masks, masks) == 1
    for metric in (metrics.aupro, metrics.aupimo):
        assert metric(masks, masks) == pytest.approx(1)
    for metric in (metrics.auroc, metrics.aupro, metrics.aupimo):
        assert metric(masks, ~masks) == 0


def test_regions_touch_at_corners_but_not_across_images():
    masks = np.zeros((2, 3, 3), bool)
    masks[0, (0, 1), (0, 1)] = True  # one region of two pixels
    masks[1, 0, 0] = True  # another, though the pixel above it in the stack is also defective
    assert metrics.aupro(masks, masks * [[[0.0]], [[1.0]]]) == pytest.approx(
        swept_aupro(masks, masks * [[[0.0]], [[1.0]]], 0.3)
    )
    assert metrics.aupro(masks, np.arange(18).reshape(2, 3, 3) == 9) == pytest.approx(
        0.5 + 0.5 * 0.3 / 2
    )


def test_counts_may_exceed_32_bits():
    labels = np.arange(200_000) % 2 == 1
    assert metrics.auroc(labels, labels.astype(np.float32)) == 1
    assert metrics.auroc(labels, np.ones(labels.size, np.float32)) == 0.5


REFUSED = {
    "shapes": (
        [0, 1],
        [1.0],
        ValueError,
        "labels and scores must have the same shape, got (2,) and (1,)",
    ),
    "empty": ([], [], ValueError, "labels and scores must not be empty, got shape (0,)"),
    "label 2": ([0, 1, 2], [1, 2, 3], ValueError, "labels must hold only 0 and 1, got 2"),
    "label 0.5": ([0.5, 1.0], [1, 2], ValueError, "labels must hold only 0 and 1, got 0.5"),
    "nan": ([0, 1], [np.nan, 1], ValueError, "scores must not be NaN, got NaN"),
    "all good": (
        [0, 0],
        [1, 2],
        ValueError,
        "labels must hold both 0 and 1 for METRIC, got only 0 (normal)",
    ),
    "all bad": (
        [1, 1],
        [1, 2],
        ValueError,
        "labels must hold both 0 and 1 for METRIC, got only 1 (defective)",
    ),
    "no label": ([0, None], [1, 2], TypeError, "labels must hold real numbers, got object"),
    "complex": ([0, 1], [1j, 2], TypeError, "scores must hold real numbers, got complex128"),
}


@pytest.mark.parametrize("metric", ALL_METRICS, ids=by_name)
@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(metric, case):
    labels, scores, error, message = REFUSED[case]
    if metric not in IMAGE_METRICS:
        message = message.replace("labels", "masks").replace("scores", "maps")
    message = message.replace("METRIC", metric.__name__)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        metric(labels, scores)


@pytest.mark.parametrize("metric", ALL_METRICS[3:], ids=by_name)
def test_maps_of_another_rank_are_refused(metric):
    with pytest.raises(
        ValueError, match=r"masks and maps must have shape \(N, H, W\), got \(2, 2\)"
    ):
        metric(np.eye(2), np.eye(2))


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, float("nan")])
def test_aupro_refuses_a_limit_outside_0_to_1(max_fpr):
    masks, maps = tied_maps(0)
    with pytest.raises(ValueError, match=rf"max_fpr must be in \(0, 1\], got {max_fpr}"):
        metrics.aupro(masks, maps, max_fpr)


@pytest.mark.parametrize(
    "bounds", [(0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.1, 2), (0.1, float("nan"))]
)
def test_aupimo_refuses_bounds_without_an_interval(bounds):
    masks, maps = tied_maps(0)
    with pytest.raises(ValueError, match=r"fpr_bounds must be 0 < low < high <= 1, got"):
        metrics.aupimo(masks, maps, bounds)


def test_aupimo_needs_a_normal_image():
    masks, maps = tied_maps(0)
    masks[3, 0, 0] = True
    with pytest.raises(ValueError, match="maps must include a normal image for aupimo, got none"):
        metrics.aupimo(masks, maps)


@pytest.mark.parametrize("top", ["defective", "normal"])
@pytest.mark.parametrize("normal", [10, 101])
def test_pro_800_equals_a_sweep_over_its_thresholds(normal, top):
    """With ten normal pixels, three of them reach the limit of 0.3 exactly, which is left out."""
    rng = np.random.default_rng(normal)
    masks = np.zeros((1, 4, normal // 2 + 3), bool)
    masks.ravel()[rng.permutation(masks.size)[: masks.size - normal]] = True
    maps = (rng.random(masks.shape) + 0.3 * masks).astype(np.float32)
    maps[masks if top == "normal" else ~masks] *= 0.9
    extreme = maps[~masks].argmax() if top == "normal" else maps[masks].argmax()
    side = ~masks if top == "normal" else masks
    maps[tuple(axis[extreme] for axis in np.nonzero(side))] = maps.max() + 0.2
    assert metrics.pro_800(masks, maps) == pytest.approx(swept_pro_800(masks, maps), abs=1e-6)


def test_pro_800_refuses_maps_without_uniform_thresholds():
    masks, maps = tied_maps(0)
    with pytest.raises(ValueError, match=r"finite and not constant, got values from 0\.0 to inf"):
        metrics.pro_800(masks, np.where(masks, np.inf, 0))
    with pytest.raises(ValueError, match=r"finite and not constant, got values from 1\.0 to 1\.0"):
        metrics.pro_800(masks, np.ones_like(maps))
    with pytest.raises(ValueError, match=r"two different false-positive rates below 0\.3"):
        metrics.pro_800(masks, masks.astype(float))
