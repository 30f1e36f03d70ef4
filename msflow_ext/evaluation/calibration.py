"""Thresholds and p-values from normal images (split conformal prediction)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEST_TUNED = "test-tuned: the threshold was chosen on the images that it is judged by"
KINDS = {"false_alarms": "good", "detected": "defective"}  # what a score above the threshold is
ROUNDING = 128 * float(np.finfo(np.float32).eps)  # batch sizes and kernels change a score by less


def margin(threshold: float) -> float:
    """Return the distance above a threshold that rounding cannot explain.

    Rounding differs a little between kernels. The margin is 128 units in the last place of float32,
    0.000015 of the threshold, and a little more for thresholds near 0.
    """
    return ROUNDING * (abs(threshold) + 0.125) if math.isfinite(threshold) else 0.0


def exceeds(values: Any, threshold: float) -> Any:
    """Return whether scores or values of a map are above a threshold by more than :func:`margin`.

    All verdicts and masks use this function.

    Args:
        values: a number, or an array of any shape.
        threshold: the threshold.

    Examples:
        >>> exceeds(2.0, 2.0), exceeds(2.000001, 2.0), exceeds(2.001, 2.0)
        (False, False, True)
    """
    return values > threshold + margin(threshold)


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out normal images, which set thresholds and p-values.

    A new normal image has a p-value of at most ``a`` with a probability of at most ``a``. This holds
    for every model and every distribution of images, if the new image and the held-out ones are
    exchangeable. The probability is over the draw of all of them.

    Attributes:
        scores: scores of the images, in rising order.
        peaks: largest value of each image's anomaly map, in rising order.

    Examples:
        >>> known = Calibration(scores=[0.1, 0.2, 0.3, 0.5], peaks=[1.0, 1.1, 1.4, 2.0])
        >>> known.p_value(0.4)  # one of the four scores at least as high, and the image itself: 2 of 5
        0.4
        >>> known.threshold(0.2), known.threshold(0.4)  # a higher rate gives a lower threshold
        (0.5, 0.3)
        >>> images_needed(0.01)  # held-out images for a rate of 1%
        99

    References:
        Laxhammar and Falkman, "Conformal prediction for distribution-independent anomaly detection
        in streaming vessel data", 2010.

        Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 51 (2023).
    """

    scores: Sequence[float]
    peaks: Sequence[float]

    @classmethod
    def of(cls, scores: np.ndarray, maps: np.ndarray) -> Calibration:
        """Return the calibration of ``scores (N,)`` and ``maps (N, H, W)``."""
        return cls(np.sort(scores).tolist(), np.sort(maps.max((1, 2))).tolist())

    def p_value(self, score: float) -> float:
        """Return the conformal p-value of a score, in (0, 1].

        It is ``(1 + images that score at least as high) / (1 + all images)``. Differences within the
        :func:`margin` are ignored. A score above all ``n`` images has the smallest p-value,
        ``1 / (n + 1)``, however large it is.
        """
        below = bisect_left(self.scores, score, key=lambda known: known + margin(known))
        return (1 + len(self.scores) - below) / (1 + len(self.scores))

    def threshold(self, false_alarms: float) -> float:
        """Return the score above which (:func:`exceeds`) the p-value is at most ``false_alarms``.

        Raises:
            ValueError: ``false_alarms`` is not between 0 and 1, or there are too few images for it.
        """
        return self._quantile(self.scores, false_alarms)

    def pixel_threshold(self, false_alarms: float) -> float:
        """Return the map value that only a share ``false_alarms`` of normal images exceed at any pixel.

        At this threshold, the masks of all other normal images are empty.

        Raises:
            ValueError: as in :meth:`threshold`.
        """
        return self._quantile(self.peaks, false_alarms)

    def _quantile(self, values: Sequence[float], false_alarms: float) -> float:
        needed = images_needed(false_alarms)
        if len(values) < needed:
            raise ValueError(
                f"false_alarms {false_alarms:g} needs {needed} held-out normal images or more, "
                f"got {len(values)}"
            )
        return values[-_rank(false_alarms, len(values))]


def images_needed(false_alarms: float) -> int:
    """Return the smallest number of held-out images for a rate of ``false_alarms``.

    Raises:
        ValueError: ``false_alarms`` is not between 0 and 1.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be above 0 and below 1, got {false_alarms}")
    first = max(1, math.floor(1 / false_alarms) - 1)
    return next(n for n in range(first, first + 3) if _rank(false_alarms, n) >= 1)


def rates(labels: Sequence[int | None], scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """Return the shares of good and defective images above a threshold.

    Returns:
        ``false_alarms`` and ``detected``, the shares of good and defective images above the
        threshold, or None without such images; ``counts``, for each share the images above the
        threshold and all images; ``intervals``, the exact 95% confidence interval of each share.
    """
    known = np.array([-1 if label is None else label for label in labels])
    over = {name: exceeds(scores[known == label], threshold) for label, name in enumerate(KINDS)}
    counts = {name: [int(each.sum()), each.size] for name, each in over.items()}
    shares = {name: above / total if total else None for name, (above, total) in counts.items()}
    intervals = {name: interval(*pair) for name, pair in counts.items() if pair[1]}
    return {**shares, "counts": counts, "intervals": intervals}


def interval(above: int, total: int) -> list[float]:
    """Return the exact 95% confidence interval of a share, by Clopper and Pearson (1934).

    Examples:
        >>> [round(bound, 3) for bound in interval(4, 8)]
        [0.157, 0.843]
    """
    from scipy.special import betaincinv

    low = betaincinv(above, total - above + 1, 0.025) if above else 0.0
    high = betaincinv(above + 1, total - above, 0.975) if above < total else 1.0
    return [float(low), float(high)]


def tuned(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Return the threshold of the largest F1 on labeled images, for comparison only.

    Such a threshold depends on the test labels, so a model never stores it.

    Args:
        labels: True for defective, with both classes.
        scores: scores or map values.

    Shape:
        labels, scores: any, but the same.

    Returns:
        ``threshold``, its ``f1``, and ``chosen``, a note that it was chosen on the test set.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    falling, found = scores.ravel()[order], np.cumsum(labels.ravel()[order])
    last = np.flatnonzero(np.diff(falling, append=-np.inf))  # equal scores have equal verdicts
    f1 = 2 * found[last] / (last + 1 + found[-1])
    best = int(np.argmax(f1))
    lowest = float(falling[last[best]])  # the lowest score above the threshold
    below = lowest - 1.5 * margin(lowest)
    return {"threshold": below, "f1": float(f1[best]), "chosen": TEST_TUNED}


def judged(
    calibration: Calibration,
    false_alarms: float,
    labels: Sequence[int | None],
    scores: np.ndarray,
) -> dict[str, Any]:
    """Return both thresholds at a rate of false alarms, and the image threshold's rates on test images.

    ``rate_interval`` contains the actual rate of false alarms of the threshold with a probability of
    95%, over the draw of the held-out images. The rate follows a beta distribution.

    References:
        Vovk, "Conditional validity of inductive conformal predictors", 2012.
    """
    from scipy.special import betaincinv

    threshold, images = calibration.threshold(false_alarms), len(calibration.scores)
    rank = _rank(false_alarms, images)
    bounds = (betaincinv(rank, images + 1 - rank, level) for level in (0.025, 0.975))
    return {
        "false_alarms": false_alarms,
        "held_out": images,
        "rate_interval": list(map(float, bounds)),
        "threshold": threshold,
        "pixel_threshold": calibration.pixel_threshold(false_alarms),
        "on_test": rates(labels, scores, threshold),
    }


def counted(found: Mapping[str, Any]) -> str:
    """Describe the result of :func:`rates` in words, counts first.

    Examples:
        >>> counted(rates([0, 0, 1], np.array([1.0, 3.0, 4.0]), 2.0))
        '1 of 2 good images (50.0%, 95% interval 1.3% to 98.7%) and 1 of 1 defective images (100.0%, 95% interval 2.5% to 100.0%)'
    """
    return " and ".join(_counted(found, name, kind) for name, kind in KINDS.items())


def explained(decisions: Mapping[str, Any]) -> str:
    """Describe in words how the threshold of :func:`judged` was set, and its statistical limits."""
    images, (low, high) = decisions["held_out"], decisions["rate_interval"]
    return (
        f"The threshold is set for {decisions['false_alarms']:.1%} false alarms by {images} good images "
        f"that were used neither for training nor for testing. Its actual rate lies between {low:.1%} "
        f"and {high:.1%} (95%). No p-value is below 1/{images + 1}, about {1 / (images + 1):.2g}."
    )


def _counted(found: Mapping[str, Any], name: str, kind: str) -> str:
    above, total = found["counts"][name]
    if not total:
        return f"none of 0 {kind} images"
    low, high = found["intervals"][name]
    percent = f"{above / total:.1%}, 95% interval {low:.1%} to {high:.1%}"
    return f"{above} of {total} {kind} images ({percent})"


def _rank(false_alarms: float, images: int) -> int:
    """Return the rank of the image that is the threshold, 1 for the highest score; 0 for too few images."""
    return math.floor(false_alarms * (images + 1) + 1e-9)
