"""The charts of a report show the given numbers."""

from __future__ import annotations

import numpy as np
import pytest

from msflow_ext.metrics import aupro, auroc, pro_curve, roc_curve
from msflow_ext.reports import charts

RNG = np.random.default_rng(0)
GOOD, DEFECTIVE = RNG.integers(0, 8, 40) / 4, RNG.integers(3, 12, 25) / 4  # many ties


def area(curve) -> float:
    *_, xs, ys = curve
    return np.sum(np.diff(xs) * (ys[1:] + ys[:-1]) / 2)


def test_the_area_under_the_roc_curve_is_the_auroc():
    labels, scores = [0] * 40 + [1] * 25, [*GOOD, *DEFECTIVE]
    images, chance = charts.roc([("images", "line", roc_curve(labels, scores))]).curves
    expected = auroc(labels, scores)
    assert area(images) == pytest.approx(1e4 * expected, rel=1e-12)
    assert area(chance) == pytest.approx(5e3)


def test_a_curve_of_many_points_is_thinned_and_keeps_its_ends_and_area():
    labels, scores = RNG.random(50_000) < 0.5, RNG.random(50_000)
    scores[labels] **= 0.2
    many = roc_curve(labels, scores)
    assert len(many[0]) > 20_000
    pixels, _ = charts.roc([("pixels", "second", many)]).curves
    *_, alarms, found = pixels
    assert len(alarms) <= 501
    assert (alarms[0], found[0], alarms[-1], found[-1]) == (0.0, 0.0, 100.0, 100.0)
    assert area(pixels) == pytest.approx(1e4 * auroc(labels, scores), rel=1e-3)


def test_the_area_under_the_pro_curve_is_the_aupro():
    masks = np.zeros((3, 20, 20), bool)
    masks[1:, 4:9, 5:12] = True
    maps = np.round(4 * RNG.standard_normal(masks.shape)) + 4 * masks
    (curve,) = charts.pro([("", "line", pro_curve(masks, maps))]).curves
    assert curve[2][-1] == 30.0
    assert area(curve) == pytest.approx(100 * 30 * aupro(masks, maps), rel=1e-9)


def test_dots_are_at_the_percentile_of_their_score_and_ties_at_the_middle():
    chart = charts.ranks(
        [0, 1, None, 1], ("a", np.array([1, 2, 3, 4])), ("b", np.array([5, 0, 5, 5]))
    )
    assert [(kind, xs.tolist(), ys.tolist()) for _, kind, xs, ys in chart.dots] == [
        ("good", [12.5], [62.5]),
        ("defective", [37.5, 87.5], [12.5, 62.5]),
        ("unlabeled", [62.5], [62.5]),
    ]


def test_the_bins_of_each_class_add_up_to_100_percent():
    chart = charts.histogram(GOOD, DEFECTIVE, [*GOOD, *DEFECTIVE])
    assert [legend for legend, *_ in chart.curves] == ["good (40)", "defective (25)"]
    for *_, edges, shares in chart.curves:
        assert shares[1:-1:2].sum() == pytest.approx(100.0)
        assert (edges[0], edges[-1]) == chart.x
        assert shares.max() <= chart.y[1]


def test_a_threshold_outside_all_scores_widens_the_histogram():
    chart = charts.histogram(GOOD, DEFECTIVE, [*GOOD, *DEFECTIVE], 9.0)
    *_, xs, ys = chart.curves[-1]
    assert xs.tolist() == [9.0, 9.0]
    assert ys.tolist() == list(chart.y)
    assert chart.x[0] < 0 < 9 < chart.x[1]


def test_the_loss_curve_skips_non_finite_values_and_keeps_the_epoch_numbers():
    (curve,) = charts.loss([3.0, float("nan"), 1.0, float("inf")]).curves
    assert curve[2].tolist() == [1.0, 3.0]
    assert curve[3].tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("chart", "note"),
    [
        (charts.roc([]), "needs good and defective test images"),
        (charts.pro([]), "needs masks of good and defective test images"),
        (charts.histogram(GOOD[:0], GOOD[:0], [1.0]), "no test image has a label"),
        (charts.loss([1.0]), "needs at least two epochs"),
    ],
    ids=["one-class", "no-masks", "unlabeled", "one-epoch"],
)
def test_a_chart_that_cannot_be_drawn_says_why(chart, note):
    assert (chart.curves, chart.note) == ((), note)


def test_points_span_the_plot_area_with_large_values_on_top():
    chart = charts.Chart("", "", "", x=(-1.0, 3.0), y=(0.0, 10.0))
    drawn = chart.points(np.array([-1.0, 1.0, 3.0]), np.array([0.0, 5.0, 10.0]))
    assert drawn == "36.0,200.0 183.0,112.0 330.0,24.0"


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-1.3, 0.1, ["-1.0", "-0.5", "0.0"]),
        (1.0, 40.0, ["10", "20", "30", "40"]),
        (1000.001, 1000.0042, ["1000.001", "1000.002", "1000.003", "1000.004"]),
        (0.0, 3e7, ["0", "1e+07", "2e+07", "3e+07"]),
    ],
    ids=str,
)
def test_ticks_are_round_numbers_with_enough_digits(low, high, labels):
    ticks = charts.Chart("", "", "", x=(low, high)).x_ticks()
    assert [text for _, text in ticks] == labels
    assert all(36.0 - 1e-6 <= place <= 330.0 + 1e-6 for place, _ in ticks)


def test_ticks_of_epochs_are_whole_numbers():
    assert [text for _, text in charts.loss([3.0, 2.0, 1.0]).x_ticks()] == ["1", "2", "3"]
    assert [text for _, text in charts.loss([1.0] * 40).x_ticks()] == ["10", "20", "30", "40"]


def test_a_strip_has_one_tick_per_distinct_place_on_the_axis_of_all_scores():
    path = charts.strip([0.0, 0.0, 5.0], scores=[0.0, 5.0, 10.0])
    places = [float(tick.split()[0]) for tick in path.split("M")[1:]]
    assert places == pytest.approx([100 * 0.2 / 10.4, 50.0], abs=0.2)
