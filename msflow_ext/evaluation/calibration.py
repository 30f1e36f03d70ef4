"""From scores to decisions: thresholds that normal images alone set, and how rare a score is among them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEST_TUNED = "test-tuned: the threshold was chosen on the images that it is judged by"


@dataclass(frozen=True)
class Calibration:
    """What a model says of normal images that it was not trained on (split conformal prediction).

    If a new normal image is as good as drawn from where these came from, then whatever the model
    and the distribution, the chance that it gets a p-value of at most ``a`` is at most ``a``, over
    the draw of all of them.

    >>> known = Calibration(scores=[0.1, 0.2, 0.3, 0.5], peaks=[1.0, 1.1, 1.4, 2.0])
    >>> known.p_value(0.4)  # one of four scores as high, and so does the image itself: 2 of 5
    0.4
    >>> known.threshold(0.2), known.threshold(0.4)  # the more false alarms are allowed, the lower
    (0.5, 0.3)
    >>> images_needed(0.01)  # so many held-out images for a rate of 1%
    99

    Attributes:
        scores: of the images, in rising order.
        peaks: the largest value of each image's anomaly map, in rising order.

    Source: Laxhammar and Falkman, "Conformal prediction for distribution-independent anomaly
        detection in streaming vessel data", 2010; Bates et al., "Testing for outliers with
        conformal p-values", Annals of Statistics 51 (2023).
    """

    scores: Sequence[float]
    peaks: Sequence[float]

    @classmethod
    def of(cls, scores: np.ndarray, maps: np.ndarray) -> Calibration:
        """From ``scores (N,)`` and ``maps (N, H, W)``."""
        return cls(np.sort(scores).tolist(), np.sort(maps.max((1, 2))).tolist())

    def p_value(self, score: float) -> float:
        """How rare it is among normal images to score so high, in (0, 1].

        ``(1 + images that score at least as high) / (1 + all images)``.
        """
        return (1 + len(self.scores) - bisect_left(self.scores, score)) / (1 + len(self.scores))

    def threshold(self, false_alarms: float) -> float:
        """The score above which the p-value is at most ``false_alarms``.

        Raises:
            ValueError: ``false_alarms`` is not in 0..1, or so small a rate needs more images.
        """
        return self._quantile(self.scores, false_alarms)

    def pixel_threshold(self, false_alarms: float) -> float:
        """The map value that at most ``false_alarms`` of the normal images reach beyond anywhere.

        So a mask on a normal image is empty but for that share of the images. Raises as `threshold`.
        """
        return self._quantile(self.peaks, false_alarms)

    def _quantile(self, values: Sequence[float], false_alarms: float) -> float:
        wanted = images_needed(false_alarms)
        if len(values) < wanted:
            raise ValueError(
                f"a false-alarm rate of {false_alarms:g} needs {wanted} held-out normal images "
                f"or more, there are {len(values)}"
            )
        return values[-_rank(false_alarms, len(values))]


def images_needed(false_alarms: float) -> int:
    """The fewest held-out images that can tell a rate of ``false_alarms``; ValueError outside 0..1."""
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be above 0 and below 1, got {false_alarms}")
    first = max(1, math.floor(1 / false_alarms) - 1)
    return next(n for n in range(first, first + 3) if _rank(false_alarms, n) >= 1)


def rates(
    labels: Sequence[int | None], scores: np.ndarray, threshold: float
) -> dict[str, float | None]:
    """What a threshold does on labelled images: the shares of the good and the defective that exceed it."""
    known = np.array([-1 if label is None else label for label in labels])
    over = [scores[known == label] > threshold for label in (0, 1)]
    shares = (float(each.mean()) if each.size else None for each in over)
    return dict(zip(("false_alarms", "detected"), shares, strict=True))


def tuned(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """The threshold of the largest F1 on labelled images, which is never a model's own.

    Shapes:
        labels, scores: the same, any, with both classes; bool and float.
    Returns:
        ``threshold``, above which is defective, ``f1``, and ``chosen``, which says what this is not.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    falling, found = scores.ravel()[order], np.cumsum(labels.ravel()[order])
    last = np.flatnonzero(np.diff(falling, append=-np.inf))  # equal scores are taken together
    f1 = 2 * found[last] / (last + 1 + found[-1])
    best = int(np.argmax(f1))
    below = np.nextafter(falling[last[best]], -np.inf, dtype=falling.dtype)
    return {"threshold": float(below), "f1": float(f1[best]), "chosen": TEST_TUNED}


def judged(
    calibration: Calibration,
    false_alarms: float,
    labels: Sequence[int | None],
    scores: np.ndarray,
) -> dict[str, Any]:
    """Both thresholds at a rate of false alarms, and what the first does on test images."""
    threshold = calibration.threshold(false_alarms)
    return {
        "false_alarms": false_alarms,
        "held_out": len(calibration.scores),
        "threshold": threshold,
        "pixel_threshold": calibration.pixel_threshold(false_alarms),
        "on_test": rates(labels, scores, threshold),
    }


def _rank(false_alarms: float, images: int) -> int:
    """Which of the images, from the highest down, is the threshold; 0: too few."""
    return math.floor(false_alarms * (images + 1) + 1e-9)
