"""Exact detection metrics; equal scores share one threshold.

A metric only depends on the number of normal scores above and at each defective score. So only the defective scores are
sorted, in pixel metrics a small share, and the normal scores are counted between them in parallel. In addition to bool
labels and float scores, this needs at most 5 bytes per score and about 50 per defective score.

All values are fractions in 0..1. ``labels`` and ``masks`` hold 0 (normal) and 1 (defective) in any real dtype. Scores
and maps are higher where more anomalous, in any range and any real dtype. An infinity is an ordinary extreme score.
Inputs are arrays, sequences or tensors.

Every metric raises ``ValueError`` for shapes that differ, empty input, labels other than 0 and 1, NaN scores, and 2**31
scores or more. It also does if only one class is present. It raises ``TypeError`` for input without real numbers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from msflow_ext.ops.ranking import ranking

Array: TypeAlias = npt.ArrayLike | torch.Tensor


def auroc(labels: Array, scores: Array) -> float:
    """Return the area under the ROC curve, equal to ``sklearn.metrics.roc_auc_score``.

    The area is summed in int64 and therefore exact.

    Args:
        labels: 0 (normal) or 1 (defective) for each score: ``(N,)`` of images or ``(N, H, W)`` of pixels.
        scores: Scores of the same shape.

    Examples:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
        0.875
    """
    tp, above, reached, normal = _ranked(*_checked("auroc", labels=labels, scores=scores))
    pairs = int(tp[-1]) * normal
    return np.dot(np.diff(tp), 2 * normal - above - reached).item() / (2 * pairs)


def average_precision(labels: Array, scores: Array) -> float:
    """Return the precision averaged over recall steps, equal to ``sklearn.metrics.average_precision_score``.

    Args:
        labels: 0 (normal) or 1 (defective) for each score: ``(N,)`` of images or ``(N, H, W)`` of pixels.
        scores: Scores of the same shape.

    Examples:
        >>> average_precision([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
        0.8333333333333333
    """
    tp, _, fp, _ = _ranked(*_checked("average_precision", labels=labels, scores=scores))
    precision = tp[1:] / (tp[1:] + fp)
    return float(np.diff(tp) @ precision / tp[-1])


def f1_max(labels: Array, scores: Array) -> float:
    """Return the largest F1 over the thresholds of ``sklearn.metrics.precision_recall_curve``.

    Args:
        labels: 0 (normal) or 1 (defective) for each score: ``(N,)`` of images or ``(N, H, W)`` of pixels.
        scores: Scores of the same shape.

    Examples:
        >>> f1_max([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
        0.8
    """
    tp, _, fp, _ = _ranked(*_checked("f1_max", labels=labels, scores=scores))
    return float(np.max(2 * tp[1:] / (tp[1:] + fp + tp[-1])))


def aupro(masks: Array, maps: Array, max_fpr: float = 0.3) -> float:
    """Return the area under :func:`pro_curve` up to ``max_fpr``, divided by ``max_fpr``.

    Args:
        masks: ``(N, H, W)``, 1 for defective pixels.
        maps: Anomaly maps ``(N, H, W)``.
        max_fpr: Largest false-positive rate, in (0, 1].

    Examples:
        >>> aupro([[[0, 0, 1, 1]]], [[[0.1, 0.2, 0.3, 0.4]]])
        1.0

    References:
        Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], got {max_fpr}")
    return area_up_to(max_fpr, *_pro_curve("aupro", masks, maps))


def aupimo(
    masks: Array,
    maps: Array,
    fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
    labels: Array | None = None,
) -> float:
    """Return the mean of :func:`aupimo_per_image` over the images with a defect.

    Examples:
        >>> masks = np.zeros((2, 4, 4), bool)
        >>> masks[1, 0] = True
        >>> aupimo(masks, masks + 0.5)
        1.0
    """
    return float(np.nanmean(aupimo_per_image(masks, maps, fpr_bounds, labels)))


def aupimo_per_image(
    masks: Array,
    maps: Array,
    fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
    labels: Array | None = None,
) -> np.ndarray:
    r"""Return the area under each image's overlap curve over the logarithm of a shared false-positive rate.

    .. math:: \frac{1}{\log(U / L)} \int_{\log L}^{\log U} T_i(F^{-1}(x))\, d \log x

    :math:`T_i` is the fraction of image i's defective pixels that reach a threshold. :math:`F` is that fraction for all
    pixels of the normal images. Between tied scores, T is linear in F, so that constant maps have the score of random
    maps: 4e-5 for the default bounds. Use at least ``1 / L`` pixels of normal images, by default 100,000.

    Args:
        masks: ``(N, H, W)``, 1 for defective pixels.
        maps: Anomaly maps ``(N, H, W)``.
        fpr_bounds: L and U, with ``0 < L < U <= 1``.
        labels: ``(N,)``, 0 for normal images. By default, images with an empty mask are normal. An image labelled 1 may
            have an empty mask; it is then neither normal nor part of the mean.

    Returns:
        ``(N,)`` float64, NaN for an image with an empty mask.

    Raises:
        ValueError: There is no normal image, an image labelled 0 has a mask that is not empty, or the bounds do not fit.

    Examples:
        >>> masks = np.zeros((2, 4, 4), bool)
        >>> masks[1, 0] = True
        >>> aupimo_per_image(masks, masks + 0.5)
        array([nan,  1.])

    References:
        Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance",
        BMVC 2024. The published code uses 300,000 uniform thresholds instead of all, and those nearest to the bounds.
    """
    low, high = fpr_bounds
    if not 0 < low < high <= 1:
        raise ValueError(f"fpr_bounds must be 0 < low < high <= 1, got {low}, {high}")
    truth, scores = _checked_maps("aupimo", masks, maps)
    defective = np.asarray(truth.any(axis=(1, 2)))
    normal = scores[_normal(defective, labels)].ravel()
    if not normal.size:
        raise ValueError("maps must include a normal image for aupimo, got none")
    # Only the highest scores matter, except for ties.
    highest = min(int(high * normal.size) + 1, normal.size)
    normal.partition(-highest)
    thresholds = np.unique(normal[-highest:])[::-1]
    start, stop = (count / normal.size for count in _counts(thresholds, normal))
    first, last = start.clip(low, high), stop.clip(low, high)
    # The area over log x below a line from (start, y0) to (stop, y1) is y0 * (length - weight) + y1 * weight.
    length = np.log(last / first)
    weight = (last - first - start * length) / (stop - start)
    areas = np.full(len(truth), np.nan)
    for i in np.flatnonzero(defective):
        found = scores[i][truth[i]]
        y0, y1 = (count / found.size for count in _counts(thresholds, found))
        areas[i] = min(1.0, (y0 @ (length - weight) + y1 @ weight) / np.log(high / low))
    return areas


def roc_curve(labels: Array, scores: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the false-positive and the true-positive rate at every threshold where the latter changes.

    Args:
        labels: 0 (normal) or 1 (defective) for each score: ``(N,)`` of images or ``(N, H, W)`` of pixels.
        scores: Scores of the same shape.

    Returns:
        Two arrays ``(P,)`` float64 that increase from 0 to 1.

    Examples:
        >>> fpr, tpr = roc_curve([0, 0, 1], [0.1, 0.3, 0.2])
        >>> fpr.tolist(), tpr.tolist()
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0])
    """
    return _curve(*_ranked(*_checked("roc_curve", labels=labels, scores=scores)))


def pro_curve(masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the false-positive rate and the per-region overlap at every threshold where the latter changes.

    The overlap is the fraction of a region's pixels that reach a threshold, averaged over all 8-connected regions of
    the masks. The false-positive rate is the fraction of all normal pixels that reach it. The curve is linear between
    the points.

    Args:
        masks: ``(N, H, W)``, 1 for defective pixels.
        maps: Anomaly maps ``(N, H, W)``.

    Returns:
        Two arrays ``(P,)`` float64 that increase from 0 to 1.

    Examples:
        >>> fpr, overlap = pro_curve([[[0, 0, 1]]], [[[0.1, 0.3, 0.2]]])
        >>> fpr.tolist(), overlap.tolist()
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0])
    """
    return _pro_curve("pro_curve", masks, maps)


def area_up_to(max_x: float, x: np.ndarray, y: np.ndarray) -> float:
    """Return the area under the lines through (x, y) from 0 to exactly ``max_x``, divided by ``max_x``.

    Args:
        max_x: Right end of the area.
        x, y: Points ``(P,)`` of a curve; x increases from 0 to ``max_x`` or more.

    Examples:
        >>> area_up_to(0.5, np.array([0.0, 1.0]), np.array([0.0, 1.0]))
        0.25
    """
    points = int(np.searchsorted(x, max_x, side="right")) + 1  # up to the first point beyond max_x
    x, y = x[:points].copy(), y[:points].copy()
    if x[-1] > max_x:
        y[-1] = np.interp(max_x, x[-2:], y[-2:])
        x[-1] = max_x
    # Rounding must not exceed the maximum.
    return min(_doubled_area(x, y) / (2 * max_x), y.max().item())


def pro_800(masks: Array, maps: Array) -> float:
    """Return the overlap score of the reference implementation of MSFlow, to compare with published tables.

    It uses 800 uniform thresholds from the lowest score upwards, and the points whose false-positive rate is below 0.3.
    That rate is then rescaled to 0..1. The value depends on the range of the maps and on the positions of the
    thresholds: use :func:`aupro` for results.

    Args:
        masks: ``(N, H, W)``, 1 for defective pixels.
        maps: Anomaly maps ``(N, H, W)``, finite and not constant.

    Examples:
        >>> maps = np.arange(64.0).reshape(1, 8, 8)
        >>> print(f"{pro_800(maps >= 48, maps):.3f}")
        1.000
    """
    truth, scores = _checked_maps("pro_800", masks, maps)
    low, high = scores.min(), scores.max()
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"maps must be finite and not constant, got values from {low} to {high}")
    step = (high - low) / scores.dtype.type(800)
    thresholds = np.unique(np.arange(low, high, step, dtype=scores.dtype))
    above, _ = ranking(thresholds[::-1], scores, truth)
    fpr = above / np.count_nonzero(~truth)  # in the order of decreasing thresholds
    exceeded = np.searchsorted(thresholds, scores[truth])  # number of thresholds below each pixel
    found = np.bincount(exceeded, _shares(truth), minlength=len(thresholds) + 1)
    overlap = found[:0:-1].cumsum()[fpr < 0.3]
    fpr = fpr[fpr < 0.3]
    if not fpr.size or fpr[0] == fpr[-1]:
        raise ValueError(
            "maps must have two different false-positive rates below 0.3 for pro_800, got fewer"
        )
    return float(_doubled_area(fpr, overlap) / (2 * (fpr[-1] - fpr[0])))


def _ranked(
    truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Count elements by the distinct scores of the defective ones, in decreasing order.

    Returns:
        The number of defective elements, or the sum of their weights, up to each score, beginning with 0. The number of
        normal elements above each score, and the number that reach it. The number of all normal elements.
    """
    defective = scores[truth]
    if weights is None:
        distinct, gains = np.unique(defective, return_counts=True)
    else:
        distinct, index = np.unique(defective, return_inverse=True)
        gains = np.bincount(index, weights)
    above, reached = ranking(distinct[::-1], scores, truth)
    found = np.concatenate(([0], gains[::-1].cumsum()))
    return found, above, reached, scores.size - defective.size


def _counts(thresholds: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the scores above each threshold, and the scores that reach it."""
    return ranking(thresholds, scores, np.zeros(scores.shape, bool))


def _pro_curve(metric: str, masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = _checked_maps(metric, masks, maps)
    return _curve(*_ranked(truth, scores, _shares(truth)))


def _curve(
    found: np.ndarray, above: np.ndarray, reached: np.ndarray, normal: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the false-positive rate and the share found, both from 0 to 1, from the results of :func:`_ranked`.

    The curve is flat over the normal scores between two defective ones, and it rises over those equal to a defective one.
    """
    fp = np.concatenate(([0], np.stack((above, reached), 1).ravel(), [normal]))
    return fp / normal, np.repeat(found / found[-1], 2)


def _doubled_area(x: np.ndarray, y: np.ndarray) -> float:
    """Return twice the trapezoid area under y(x)."""
    return np.dot(np.diff(x), y[1:] + y[:-1]).item()


def _shares(masks: np.ndarray) -> np.ndarray:
    """Return what each defective pixel adds to the overlap: 1 / (area of its region * number of regions)."""
    from scipy import ndimage

    regions, count = [], 0
    for mask in masks:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if rows.size:
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            numbered, found = ndimage.label(box, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
            regions.append(numbered[box] + (count - 1))
            count += found
    regions = np.concatenate(regions)
    return 1 / (count * np.bincount(regions))[regions]


def _checked(metric: str, **pair: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair of arguments as a bool and a float array of one shape, after checking them."""
    (labels, truth), (name, scores) = ((name, _array(given)) for name, given in pair.items())
    both = f"{labels} and {name}"
    for argument, array in ((labels, truth), (name, scores)):
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{argument} must hold real numbers, got {array.dtype}")
    if truth.shape != scores.shape:
        raise ValueError(f"{both} must have the same shape, got {truth.shape} and {scores.shape}")
    if not truth.size:
        raise ValueError(f"{both} must not be empty, got shape {truth.shape}")
    if truth.dtype != np.bool_:
        strange = truth[(truth != 0) & (truth != 1)]
        if strange.size:
            raise ValueError(f"{labels} must hold only 0 and 1, got {strange[0]}")
        truth = truth != 0
    if np.isnan(scores.max()):
        raise ValueError(f"{name} must not be NaN, got NaN")
    if truth.all() or not truth.any():
        only = "1 (defective)" if truth.any() else "0 (normal)"
        raise ValueError(f"{labels} must hold both 0 and 1 for {metric}, got only {only}")
    exact = scores.dtype.kind == "f" and scores.dtype.itemsize >= 4
    return truth, scores if exact else scores.astype(np.promote_types(scores.dtype, np.float32))


def _checked_maps(metric: str, masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = _checked(metric, masks=masks, maps=maps)
    if truth.ndim != 3:
        raise ValueError(f"masks and maps must have shape (N, H, W), got {truth.shape}")
    return truth, scores


def _normal(defective: np.ndarray, labels: Array | None) -> np.ndarray:
    """Return ``(N,)`` bool, True for normal images: those labelled 0, or without labels those with an empty mask."""
    if labels is None:
        return ~defective
    given = _array(labels)
    if given.shape != defective.shape or not np.isin(given, (0, 1)).all():
        shape = defective.shape
        raise ValueError(f"labels must have shape {shape} and hold only 0 and 1, got {given}")
    if (defective & (given == 0)).any():
        first = int(np.flatnonzero(defective & (given == 0))[0])
        raise ValueError(f"masks of images labelled 0 must be empty, got a defect in image {first}")
    return given == 0


def _array(given: Array) -> np.ndarray:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    return np.asarray(given)


RESULTS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
