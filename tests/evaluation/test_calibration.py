"""Thresholds from normal images keep their promise, and a p-value says how rare a score is."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from msflow_ext.evaluation.calibration import Calibration, images_needed, judged, rates, tuned


def calibration(scores: np.ndarray) -> Calibration:
    return Calibration.of(scores, np.stack([np.zeros_like(scores), scores + 10])[None].T)


def test_a_p_value_counts_the_normal_images_that_score_as_high_and_the_image_itself():
    known = calibration(np.array([3.0, 1.0, 2.0, 2.0]))
    assert [known.p_value(s) for s in (0, 1, 2, 2.5, 3, 4)] == [1.0, 1.0, 0.8, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("false_alarms", [0.01, 0.05, 0.1, 1 / 3, 0.5])
@pytest.mark.parametrize("more", [0, 1, 30])
def test_exceeding_the_threshold_is_a_p_value_of_at_most_the_rate(false_alarms, more):
    rng = np.random.default_rng(0)
    known = calibration(rng.integers(0, 60, images_needed(false_alarms) + more).astype(float))
    threshold = known.threshold(false_alarms)
    for score in range(-1, 62):
        assert (score > threshold) == (known.p_value(score) <= false_alarms + 1e-12)
    assert known.pixel_threshold(false_alarms) == threshold + 10


def test_the_rate_of_false_alarms_is_kept_on_new_normal_images():
    rng = np.random.default_rng(0)
    over = [
        np.mean(rng.normal(size=200) > calibration(rng.normal(size=39)).threshold(0.05))
        for _ in range(1000)
    ]
    assert 0.04 < np.mean(over) < 0.055


def test_too_few_images_for_a_rate_and_a_rate_that_is_none_are_refused():
    assert [images_needed(a) for a in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    with pytest.raises(ValueError, match=r"rate of 0.1 needs 9 held-out .* or more, there are 8"):
        calibration(np.zeros(8)).threshold(0.1)
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="false_alarms must be above 0 and below 1"):
            calibration(np.zeros(8)).threshold(wrong)


def test_the_share_of_each_class_over_a_threshold_is_none_without_that_class():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    assert rates([0, 0, 1, None], scores, 1.0) == {"false_alarms": 0.5, "detected": 1.0}
    assert rates([0, 0, None, None], scores, 1.5) == {"false_alarms": 0.5, "detected": None}
    found = judged(calibration(np.arange(3.0)), 0.25, [0, 0, 1, 1], scores)
    assert found == {
        "false_alarms": 0.25,
        "held_out": 3,
        "threshold": 2.0,
        "pixel_threshold": 12.0,
        "on_test": {"false_alarms": 0.0, "detected": 1.0},
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_tuned_threshold_gives_the_largest_f1_and_says_that_it_is_tuned(dtype):
    rng = np.random.default_rng(0)
    for levels in (3, 1000):
        labels = rng.random((5, 40)) < 0.3
        scores = (rng.integers(0, levels, labels.shape) + 0.4 * levels * labels).astype(dtype)
        found = tuned(labels, scores)
        precision, recall, _ = precision_recall_curve(labels.ravel(), scores.ravel())
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        assert found["f1"] == pytest.approx(f1.max())
        over = scores > found["threshold"]
        assert 2 * (over & labels).sum() / (over.sum() + labels.sum()) == pytest.approx(f1.max())
        assert "test-tuned" in found["chosen"]


def test_the_tuned_threshold_may_lie_below_every_score():
    labels, scores = np.array([True, False, True]), np.array([3.0, 2.0, 1.0])
    found = tuned(labels, scores)
    assert found["f1"] == pytest.approx(0.8)
    assert found["threshold"] == np.nextafter(1.0, 0)
