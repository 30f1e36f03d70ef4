"""The settings of `msflow predict` reach the detector that they load."""

from __future__ import annotations

from pathlib import Path

import pytest

import msflow_ext as mx
from msflow_ext.inference.settings import Scoring


@pytest.fixture(scope="module")
def run(untrained_run) -> Path:
    """The checkpoint of an untrained model with thresholds."""
    return untrained_run(
        recipe={"false_alarms": 0.4},
        calibration={"scores": [1.0, 2.0, 3.0, 4.0], "peaks": [5.0, 6.0, 7.0, 8.0]},
    )


def test_the_rate_of_false_alarms_sets_both_thresholds(run):
    plain, strict = (Scoring(false_alarms=rate).load(str(run), "cpu") for rate in (None, 0.2))
    assert (plain.threshold, plain.pixel_threshold) == (3.0, 7.0)
    assert (strict.threshold, strict.pixel_threshold) == (4.0, 8.0)


def test_false_alarms_need_a_run_with_held_out_images(untrained_run):
    run = untrained_run()
    assert Scoring().load(str(run), "cpu").threshold is None
    with pytest.raises(ValueError, match="its training held out no images"):
        Scoring(false_alarms=0.2).load(str(run), "cpu")


def test_a_given_threshold_replaces_only_the_image_threshold(run):
    detector = Scoring(threshold=2.5).load(str(run), "cpu")
    assert (detector.threshold, detector.pixel_threshold) == (2.5, 7.0)
    assert Scoring(threshold=0.0).load(str(run), "cpu").threshold == 0.0


def test_the_precision_is_that_of_the_optimized_model(run):
    found = Scoring(precision="bfloat16").load(str(run), "cpu")
    expected = mx.load(run, "cpu", precision="bfloat16")
    assert type(found.model.head) is type(expected.model.head)
    assert type(found.model.head) is not type(Scoring().load(str(run), "cpu").model.head)


def test_tiles_use_only_the_given_threshold(run):
    for threshold in (None, 2.5):
        detector = Scoring(tile=True, threshold=threshold).load(str(run), "cpu")
        assert detector.threshold == threshold
        assert (detector.pixel_threshold, detector.calibration) == (None, None)
    with pytest.raises(ValueError, match="--false-alarms must not be given with --tile"):
        Scoring(tile=True, false_alarms=0.1)
