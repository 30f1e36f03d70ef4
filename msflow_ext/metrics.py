"""Exact detection metrics, with equal scores taken together.

Every one needs to know how many normal scores are above and at each defective score, and no more:
between two defective scores, the false positives alone grow. So only the defective scores are sorted
(in pixel metrics a small share), and the normal ones are counted between them, in parallel. Beside
bool labels and float scores this takes at most 5 bytes per score and about 50 per defective one.

All values are fractions in 0..1. ``labels`` and ``masks`` hold 0 (normal) and 1 (defective) in any
real dtype. Scores and maps are higher where more anomalous, in any range and any real dtype
(integers are taken as floats); an infinity is an ordinary extreme score. Inputs are arrays,
sequences or tensors.

Every metric raises ``ValueError`` for shapes that differ, empty input, labels other than 0 and 1,
NaN scores, 2**31 scores or more, and where it is undefined because only one class is present;
``TypeError`` for input that does not hold real numbers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from msflow_ext.ops.ranking import ranking

Array: TypeAlias = npt.ArrayLike | torch.Tensor


def auroc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve, equal to ``sklearn.metrics.roc_auc_score``.

    The area is summed in int64, hence exact.

    Shapes:
        labels, scores: the same, any; image labels ``(N,)`` or pixel masks ``(N, H, W)``.
    """
    tp, above, reached, normal = _ranked(*_checked("auroc", labels=labels, scores=scores))
    pairs = int(tp[-1]) * normal
    return np.dot(np.diff(tp), 2 * normal - above - reached).item() / (2 * pairs)


def average_precision(labels: Array, scores: Array) -> float:
    """Precision averaged over recall steps, equal to ``sklearn.metrics.average_precision_score``.

    Shapes:
        labels, scores: the same, any.
    """
    tp, _, fp, _ = _ranked(*_checked("average_precision", labels=labels, scores=scores))
    precision = tp[1:] / (tp[1:] + fp)
    return float(np.diff(tp) @ precision / tp[-1])


def f1_max(labels: Array, scores: Array) -> float:
    """The best F1 over all thresholds, that of ``sklearn.metrics.precision_recall_curve``.

    Shapes:
        labels, scores: the same, any.
    """
    tp, _, fp, _ = _ranked(*_checked("f1_max", labels=labels, scores=scores))
    return float(np.max(2 * tp[1:] / (tp[1:] + fp + tp[-1])))


def aupro(masks: Array, maps: Array, max_fpr: float = 0.3) -> float:
    """Area under :func:`pro_curve` up to ``max_fpr``, divided by ``max_fpr``.

    Shapes:
        masks, maps: ``(N, H, W)``.
    Raises:
        ValueError: also for ``max_fpr`` outside (0, 1].
    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"aupro: max_fpr must be in (0, 1], got {max_fpr}")
    return area_up_to(max_fpr, *_pro_curve("aupro", masks, maps))


def aupimo(
    masks: Array,
    maps: Array,
    fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
    labels: Array | None = None,
) -> float:
    """The mean of :func:`aupimo_per_image` over the images with a defect."""
    return float(np.nanmean(aupimo_per_image(masks, maps, fpr_bounds, labels)))


def aupimo_per_image(
    masks: Array,
    maps: Array,
    fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
    labels: Array | None = None,
) -> np.ndarray:
    r"""Area under each image's own overlap curve, over the logarithm of a shared rate.

    .. math:: \frac{1}{\log(U / L)} \int_{\log L}^{\log U} T_i(F^{-1}(x))\, d \log x

    :math:`T_i` is the fraction of image i's defective pixels that reach a threshold, F that of all
    pixels of the normal images. Where scores tie, T is linear in F, so that constant maps score as
    little as random ones: 4e-5 for the default bounds. A fine curve needs at least ``1 / L`` pixels of
    normal images, 100,000 by default.

    Shapes:
        masks, maps: ``(N, H, W)``.
        labels: ``(N,)``, 0 for normal images. A defective one may have an empty mask: it counts neither
            as normal nor in the mean. Without labels, images without a mask are the normal ones.
    Returns:
        ``(N,)`` float64, NaN for an image without a marked defect.
    Raises:
        ValueError: also for bounds that are not 0 < L < U <= 1, without a normal image, and for an
            image labelled 0 whose mask is not empty.
    Source: Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed
        and Low Tolerance", BMVC 2024. The authors' code takes 300,000 uniform thresholds instead of
        all, and the ones nearest to the bounds.
    """
    low, high = fpr_bounds
    if not 0 < low < high <= 1:
        raise ValueError(f"aupimo: fpr_bounds must be 0 < low < high <= 1, got {low}, {high}")
    truth, scores = _checked_maps("aupimo", masks, maps)
    defective = np.asarray(truth.any(axis=(1, 2)))
    normal = scores[_normal(defective, labels)].ravel()
    if not normal.size:
        raise ValueError("aupimo is undefined: there is no image without a defect")
    highest = min(int(high * normal.size) + 1, normal.size)  # scores that matter, ties aside
    normal.partition(-highest)
    thresholds = np.unique(normal[-highest:])[::-1]
    start, stop = (count / normal.size for count in _counts(thresholds, normal))
    first, last = start.clip(low, high), stop.clip(low, high)
    # A curve that is linear from (start, y0) to (stop, y1) has this area over log x: y0 and y1 times
    length = np.log(last / first)
    weight = (last - first - start * length) / (stop - start)
    areas = np.full(len(truth), np.nan)
    for i in np.flatnonzero(defective):
        found = scores[i][truth[i]]
        y0, y1 = (count / found.size for count in _counts(thresholds, found))
        areas[i] = min(1.0, (y0 @ (length - weight) + y1 @ weight) / np.log(high / low))
    return areas


def roc_curve(labels: Array, scores: Array) -> tuple[np.ndarray, np.ndarray]:
    """False-positive and true-positive rate at every threshold where the latter changes.

    Shapes:
        labels, scores: the same, any.
    Returns:
        Two arrays ``(P,)`` float64 that rise from 0 to 1.
    """
    return _curve(*_ranked(*_checked("roc_curve", labels=labels, scores=scores)))


def pro_curve(masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and per-region overlap at every threshold where the latter changes.

    The overlap at a threshold is the fraction of a region's pixels that reach it, averaged over all
    8-connected regions of the masks; the false-positive rate is the fraction of all normal pixels
    that reach it. Between the points the curve is linear.

    Shapes:
        masks, maps: ``(N, H, W)``.
    Returns:
        Two arrays ``(P,)`` float64 that rise from 0 to 1.
    """
    return _pro_curve("pro_curve", masks, maps)


def area_up_to(max_x: float, x: np.ndarray, y: np.ndarray) -> float:
    """Area under the lines through (x, y) from 0 to exactly ``max_x``, divided by ``max_x``.

    Shapes:
        x, y: ``(P,)``, x rising from 0 to ``max_x`` or more.
    """
    points = int(np.searchsorted(x, max_x, side="right")) + 1  # up to the first one past the limit
    x, y = x[:points].copy(), y[:points].copy()
    if x[-1] > max_x:
        y[-1] = np.interp(max_x, x[-2:], y[-2:])
        x[-1] = max_x
    return min(_doubled_area(x, y) / (2 * max_x), y.max().item())  # not above it by rounding


def pro_800(masks: Array, maps: Array) -> float:
    """The overlap score as the MSFlow authors compute it, only to compare with their tables.

    800 uniform thresholds from the lowest score up; only the points whose false-positive rate is
    below 0.3; that rate rescaled so that it spans 0..1. The value depends on the range of the maps
    and on where the thresholds fall: use :func:`aupro` for results.

    Shapes:
        masks, maps: ``(N, H, W)``; maps finite and not constant.
    """
    truth, scores = _checked_maps("pro_800", masks, maps)
    low, high = scores.min(), scores.max()
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"pro_800: maps must be finite and vary, got values from {low} to {high}")
    step = (high - low) / scores.dtype.type(800)
    thresholds = np.unique(np.arange(low, high, step, dtype=scores.dtype))
    above, _ = ranking(thresholds[::-1], scores, truth)
    fpr = above / np.count_nonzero(~truth)  # from the highest threshold down
    exceeded = np.searchsorted(thresholds, scores[truth])  # how many of them each pixel is above
    found = np.bincount(exceeded, _shares(truth), minlength=len(thresholds) + 1)
    overlap = found[:0:-1].cumsum()[fpr < 0.3]
    fpr = fpr[fpr < 0.3]
    if not fpr.size or fpr[0] == fpr[-1]:
        raise ValueError("pro_800 is undefined: no two false-positive rates of maps are below 0.3")
    return _doubled_area(fpr, overlap) / (2 * (fpr[-1] - fpr[0]))


def _ranked(
    truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The distinct scores of defective elements against the normal ones, from the highest down.

    Returns:
        Defective elements up to each, from 0 at the start on: their number, or sum of weights.
        The number of normal scores above each, and of those that reach it. That of all.
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
    """How many of all scores are above each threshold, and how many reach it."""
    return ranking(thresholds, scores, np.zeros(scores.shape, bool))


def _pro_curve(metric: str, masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = _checked_maps(metric, masks, maps)
    return _curve(*_ranked(truth, scores, _shares(truth)))


def _curve(
    found: np.ndarray, above: np.ndarray, reached: np.ndarray, normal: int
) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and share found, of what :func:`_ranked` gives, both from 0 to 1.

    Flat up to the normal scores above a defective one, and rising over those equal to it.
    """
    fp = np.concatenate(([0], np.stack((above, reached), 1).ravel(), [normal]))
    return fp / normal, np.repeat(found / found[-1], 2)


def _doubled_area(x: np.ndarray, y: np.ndarray) -> float:
    """Twice the trapezoid area under y(x)."""
    return np.dot(np.diff(x), y[1:] + y[:-1]).item()


def _shares(masks: np.ndarray) -> np.ndarray:
    """What each defective pixel, in order, adds to the overlap: 1 / (area of its region, regions)."""
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
    """The pair as a bool array and a float array of the same shape, or an error that names them."""
    (labels, truth), (name, scores) = ((name, _array(given)) for name, given in pair.items())
    both = f"{metric}: {labels} and {name}"
    for argument, array in ((labels, truth), (name, scores)):
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{metric}: {argument} must hold real numbers, got {array.dtype}")
    if truth.shape != scores.shape:
        raise ValueError(f"{both} must have one shape, got {truth.shape} and {scores.shape}")
    if not truth.size:
        raise ValueError(f"{both} are empty, shape {truth.shape}")
    if truth.dtype != np.bool_:
        strange = truth[(truth != 0) & (truth != 1)]
        if strange.size:
            raise ValueError(f"{metric}: {labels} must hold only 0 and 1, got {strange[0]}")
        truth = truth != 0
    if np.isnan(scores.max()):
        raise ValueError(f"{metric}: {name} hold NaN")
    if truth.all() or not truth.any():
        only = "1 (defective)" if truth.any() else "0 (normal)"
        raise ValueError(f"{metric} is undefined: {labels} hold only class {only}")
    wide = scores.dtype.kind == "f" and scores.dtype.itemsize >= 4
    return truth, scores if wide else scores.astype(np.promote_types(scores.dtype, np.float32))


def _checked_maps(metric: str, masks: Array, maps: Array) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = _checked(metric, masks=masks, maps=maps)
    if truth.ndim != 3:
        raise ValueError(f"{metric}: masks and maps must be (N, H, W), got {truth.shape}")
    return truth, scores


def _normal(defective: np.ndarray, labels: Array | None) -> np.ndarray:
    """Bool ``(N,)``: the images labelled 0; without labels, those without a defect in their masks."""
    if labels is None:
        return ~defective
    given = _array(labels)
    if given.shape != defective.shape or not np.isin(given, (0, 1)).all():
        shape = defective.shape
        raise ValueError(f"aupimo: labels must be {shape} of 0 and 1, got {given.shape} of {given}")
    if (defective & (given == 0)).any():
        first = int(np.flatnonzero(defective & (given == 0))[0])
        raise ValueError(
            f"aupimo: masks of images labelled 0 must be empty, that of {first} is not"
        )
    return given == 0


def _array(given: Array) -> np.ndarray:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    return np.asarray(given)


RESULTS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
