"""From scores to decisions: thresholds that normal images alone set, and how rare a score is among them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEST_TUNED = "test-tuned: the threshold was chosen on the images that it is judged by"
KINDS = {"false_alarms": "good", "detected": "defective"}  # of images, by what exceeding means
ROUNDING = 128 * float(np.finfo(np.float32).eps)  # batches and kernels differ by less


def margin(threshold: float) -> float:
    """Return by how much a score must be above a threshold, so that rounding alone does not suffice.

    It is 128 units in the last place of float32, 0.000015 of the threshold, and a little more for
    thresholds near 0: one image scores a little differently in another batch or with other kernels.
    """
    return ROUNDING * (abs(threshold) + 0.125) if math.isfinite(threshold) else 0.0


def exceeds(values: Any, threshold: float) -> Any:
    """Return whether scores or values of a map are above a threshold, by more than :func:`margin`.

    All verdicts and masks are decided here.

    >>> exceeds(2.0, 2.0), exceeds(2.000001, 2.0), exceeds(2.001, 2.0)
    (False, False, True)

    Args:
        values: a number, or an array of any shape.
    """
    return values > threshold + margin(threshold)


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
        """How rare it is among normal images to score so high, at most: in (0, 1].

        ``(1 + images that score at least as high) / (1 + all images)``, where rounding makes no
        score higher. Above all ``n`` images it is ``1 / (n + 1)``, however large the score: more
        images would be needed to tell it from rarer ones.
        """
        below = bisect_left(self.scores, score, key=lambda known: known + margin(known))
        return (1 + len(self.scores) - below) / (1 + len(self.scores))

    def threshold(self, false_alarms: float) -> float:
        """The score above which (:func:`exceeds`) the p-value is at most ``false_alarms``.

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
        needed = images_needed(false_alarms)
        if len(values) < needed:
            raise ValueError(
                f"a false-alarm rate of {false_alarms:g} needs {needed} held-out normal images "
                f"or more, there are {len(values)}"
            )
        return values[-_rank(false_alarms, len(values))]


def images_needed(false_alarms: float) -> int:
    """The fewest held-out images that can tell a rate of ``false_alarms``; ValueError outside 0..1."""
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be above 0 and below 1, got {false_alarms}")
    first = max(1, math.floor(1 / false_alarms) - 1)
    return next(n for n in range(first, first + 3) if _rank(false_alarms, n) >= 1)


def rates(labels: Sequence[int | None], scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """What a threshold does on labelled images.

    Returns:
        ``false_alarms`` and ``detected``, the shares of the good and of the defective images above
        it, None without such images; ``counts``, for each the images above it and all of them;
        ``intervals``, for each the exact 95% confidence interval of the share.
    """
    known = np.array([-1 if label is None else label for label in labels])
    over = {name: exceeds(scores[known == label], threshold) for label, name in enumerate(KINDS)}
    counts = {name: [int(each.sum()), each.size] for name, each in over.items()}
    shares = {name: above / total if total else None for name, (above, total) in counts.items()}
    intervals = {name: interval(*pair) for name, pair in counts.items() if pair[1]}
    return {**shares, "counts": counts, "intervals": intervals}


def interval(above: int, total: int) -> list[float]:
    """The exact 95% confidence interval of a share that was counted, by Clopper and Pearson (1934).

    >>> [round(bound, 3) for bound in interval(4, 8)]
    [0.157, 0.843]
    """
    from scipy.special import betaincinv

    low = betaincinv(above, total - above + 1, 0.025) if above else 0.0
    high = betaincinv(above + 1, total - above, 0.975) if above < total else 1.0
    return [float(low), float(high)]


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
    lowest = float(falling[last[best]])  # of those that are to be above the threshold
    below = lowest - 1.5 * margin(lowest)
    return {"threshold": below, "f1": float(f1[best]), "chosen": TEST_TUNED}


def judged(
    calibration: Calibration,
    false_alarms: float,
    labels: Sequence[int | None],
    scores: np.ndarray,
) -> dict[str, Any]:
    """Both thresholds at a rate of false alarms, and what the first does on test images.

    ``rate_interval`` says where the rate of false alarms of this very threshold lies with a
    probability of 95%, over the draw of the held-out images: it follows a beta distribution
    (Vovk, "Conditional validity of inductive conformal predictors", 2012).
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
    """Say what :func:`rates` found, counts first.

    >>> counted(rates([0, 0, 1], np.array([1.0, 3.0, 4.0]), 2.0))
    '1 of 2 good images (50.0%, 95% interval 1.3% to 98.7%) and 1 of 1 defective images (100.0%, 95% interval 2.5% to 100.0%)'
    """
    return " and ".join(_counted(found, name, kind) for name, kind in KINDS.items())


def explained(decisions: Mapping[str, Any]) -> str:
    """Say where the thresholds of :func:`judged` come from, and how much they can promise."""
    images, (low, high) = decisions["held_out"], decisions["rate_interval"]
    return (
        f"The threshold is set for {decisions['false_alarms']:.1%} false alarms by {images} good images "
        f"that were neither trained on nor tested; its own rate lies between {low:.1%} and {high:.1%} "
        f"(95%). No p-value is below 1/{images + 1}, which means at most {1 / (images + 1):.2g}."
    )


def _counted(found: Mapping[str, Any], name: str, kind: str) -> str:
    above, total = found["counts"][name]
    if not total:
        return f"none of 0 {kind} images"
    low, high = found["intervals"][name]
    percent = f"{above / total:.1%}, 95% interval {low:.1%} to {high:.1%}"
    return f"{above} of {total} {kind} images ({percent})"


def _rank(false_alarms: float, images: int) -> int:
    """Which of the images, from the highest down, is the threshold; 0: too few."""
    return math.floor(false_alarms * (images + 1) + 1e-9)
