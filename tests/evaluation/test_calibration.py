"""Thresholds keep the rate of false alarms, and p-values are those of split conformal prediction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from msflow_ext.evaluation.calibration import (
    Calibration,
    counted,
    exceeds,
    explained,
    images_needed,
    interval,
    judged,
    rates,
    tuned,
)


def calibration(scores: np.ndarray) -> Calibration:
    return Calibration.of(scores, np.stack([np.zeros_like(scores), scores + 10])[None].T)


def test_a_p_value_counts_the_normal_images_with_at_least_that_score():
    known = calibration(np.array([3.0, 1.0, 2.0, 2.0]))
    assert [known.p_value(s) for s in (0, 1, 2, 2.5, 3, 4)] == [1.0, 1.0, 0.8, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("false_alarms", [0.01, 0.05, 0.1, 1 / 3, 0.5])
@pytest.mark.parametrize("more", [0, 1, 30])
def test_a_score_above_the_threshold_has_a_p_value_of_at_most_the_rate(false_alarms, more):
    rng = np.random.default_rng(0)
    known = calibration(rng.integers(0, 60, images_needed(false_alarms) + more).astype(float))
    threshold = known.threshold(false_alarms)
    for score in range(-1, 62):
        assert (score > threshold) == (known.p_value(score) <= false_alarms + 1e-12)
    assert known.pixel_threshold(false_alarms) == threshold + 10


def test_new_normal_images_keep_the_rate_of_false_alarms():
    rng = np.random.default_rng(0)
    over = [
        np.mean(rng.normal(size=200) > calibration(rng.normal(size=39)).threshold(0.05))
        for _ in range(1000)
    ]
    assert 0.04 < np.mean(over) < 0.055


def test_too_few_images_and_rates_out_of_range_are_refused():
    assert [images_needed(a) for a in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    with pytest.raises(ValueError, match=r"false_alarms 0.1 needs 9 held-out .* or more, got 8"):
        calibration(np.zeros(8)).threshold(0.1)
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="false_alarms must be above 0 and below 1"):
            calibration(np.zeros(8)).threshold(wrong)


@pytest.mark.family("thresholds")
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 2.4137327671051, -7.5, 1e4])
def test_a_score_exceeds_a_threshold_only_beyond_rounding(threshold):
    unit = abs(threshold) * 2.0**-23  # in the last place of float32
    assert not exceeds(threshold, threshold)
    assert not exceeds(threshold + 120 * unit + 1e-6, threshold)
    assert exceeds(threshold + 130 * unit + 2e-6, threshold)
    assert exceeds(threshold, -math.inf) and not exceeds(threshold, math.inf)
    pixels = np.array([threshold - 1, threshold, threshold + 130 * unit + 2e-6])
    assert exceeds(pixels, threshold).tolist() == [False, False, True]


@pytest.mark.family("thresholds")
@pytest.mark.parametrize("noise", [0.0, 1e-6, -1e-6, 7e-6, -7e-6])
def test_the_image_that_sets_the_threshold_stays_good_under_rounding(noise):
    scores = np.array([-3.0, 0.2, 1.1, 2.4137327671051])
    known = calibration(scores)
    again = scores * (1 + noise)
    assert not exceeds(again[-1], known.threshold(0.2))
    assert [known.p_value(s) for s in again] == [known.p_value(s) for s in scores]
    assert known.p_value(again[-1]) == 0.4 > 0.2


def test_the_smallest_p_value_depends_only_on_the_number_of_images():
    known = calibration(np.arange(10.0))
    assert known.p_value(9.1) == known.p_value(1e9) == 1 / 11


def test_rates_above_a_threshold_are_none_for_a_missing_class():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    found = rates([0, 0, 1, None], scores, 1.0)
    assert (found["false_alarms"], found["detected"]) == (0.5, 1.0)
    assert found["counts"] == {"false_alarms": [1, 2], "detected": [1, 1]}
    found = rates([0, 0, None, None], scores, 1.5)
    assert (found["false_alarms"], found["detected"]) == (0.5, None)
    assert found["counts"]["detected"] == [0, 0]
    assert found["intervals"].keys() == {"false_alarms"}


def test_the_decisions_of_a_run_hold_thresholds_and_rates_on_test_images():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    found = judged(calibration(np.arange(3.0)), 0.25, [0, 0, 1, 1], scores)
    assert found == {
        "false_alarms": 0.25,
        "held_out": 3,
        "rate_interval": pytest.approx([1 - 0.975 ** (1 / 3), 1 - 0.025 ** (1 / 3)]),
        "threshold": 2.0,
        "pixel_threshold": 12.0,
        "on_test": rates([0, 0, 1, 1], scores, 2.0),
    }
    assert found["on_test"]["detected"] == 1.0


@pytest.mark.family("score tables")
@pytest.mark.parametrize("total", [1, 8, 40])
def test_an_interval_cuts_two_and_a_half_percent_off_each_binomial_tail(total):
    def at_most(above: int, share: float) -> float:
        terms = (
            math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(above + 1)
        )
        return sum(terms)

    for above in range(total + 1):
        low, high = interval(above, total)
        assert 0 <= low <= above / total <= high <= 1
        if above:
            assert 1 - at_most(above - 1, low) == pytest.approx(0.025)
        if above < total:
            assert at_most(above, high) == pytest.approx(0.025)


def test_the_interval_contains_the_rate_of_a_threshold_in_95_percent_of_draws():
    low, high = judged(calibration(np.arange(20.0)), 0.1, [], np.array([]))["rate_interval"]
    uniform = np.random.default_rng(0).random(
        (4000, 20)
    )  # uniform scores: a threshold's rate is 1 - threshold
    rate = 1 - np.sort(uniform)[:, -2]
    assert 0.94 < np.mean((low <= rate) & (rate <= high)) < 0.96


@pytest.mark.family("score tables")
def test_percentages_are_shown_with_counts():
    found = judged(calibration(np.arange(10.0)), 0.1, [0] * 8 + [1], np.arange(9.0) + 5)
    assert counted(found["on_test"]) == (
        "3 of 8 good images (37.5%, 95% interval 8.5% to 75.5%) and "
        "1 of 1 defective images (100.0%, 95% interval 2.5% to 100.0%)"
    )
    said = explained(found)
    assert "set for 10.0% false alarms by 10 good images" in said
    assert "between 0.3% and 30.8% (95%)" in said
    assert "No p-value is below 1/11, about 0.091" in said
    assert "none of 0 defective images" in counted(rates([0], np.array([1.0]), 0.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_tuned_threshold_has_the_largest_f1_and_is_marked_as_tuned(dtype):
    rng = np.random.default_rng(0)
    for levels in (3, 1000):
        labels = rng.random((5, 40)) < 0.3
        scores = (rng.integers(0, levels, labels.shape) + 0.4 * levels * labels).astype(dtype)
        found = tuned(labels, scores)
        precision, recall, _ = precision_recall_curve(labels.ravel(), scores.ravel())
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        assert found["f1"] == pytest.approx(f1.max())
        over = exceeds(scores, found["threshold"])
        assert 2 * (over & labels).sum() / (over.sum() + labels.sum()) == pytest.approx(f1.max())
        assert "test-tuned" in found["chosen"]


def test_the_tuned_threshold_may_be_below_all_scores():
    labels, scores = np.array([True, False, True]), np.array([3.0, 2.0, 1.0])
    found = tuned(labels, scores)
    assert found["f1"] == pytest.approx(0.8)
    assert exceeds(scores, found["threshold"]).all()
    assert found["threshold"] == pytest.approx(1.0, abs=1e-4)
