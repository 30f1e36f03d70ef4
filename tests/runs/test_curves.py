"""Stored curves are points of the measured ones."""

from __future__ import annotations

import re

import numpy as np
import pytest

from msflow_ext.metrics import area_up_to, pro_curve, roc_curve
from msflow_ext.runs.curves import read_curves, write_curves

RNG = np.random.default_rng(0)
MASKS = np.zeros((6, 64, 64), bool)
MASKS[1:, 4:19, 5:32] = True
MAPS = RNG.standard_normal(MASKS.shape) + 2 * MASKS


def test_few_points_are_stored_and_all_are_on_the_curve(tmp_path):
    whole = {"pixel_roc": roc_curve(MASKS, MAPS), "pro": pro_curve(MASKS, MAPS)}
    write_curves(tmp_path, whole)
    found = read_curves(tmp_path)
    assert found.keys() == whole.keys()
    for name, points in found.items():
        assert 300 < len(points[0]) <= 501 < len(whole[name][0])
        assert set(zip(*points, strict=True)) <= set(zip(*whole[name], strict=True))
        assert area_up_to(0.3, *points) == pytest.approx(area_up_to(0.3, *whole[name]), abs=5e-4)
    assert (tmp_path / "curves.json").stat().st_size < 50_000


def test_a_run_without_curves_has_no_file(tmp_path):
    write_curves(tmp_path, {})
    assert not list(tmp_path.iterdir())
    assert read_curves(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"pro": 1}',
        '{"pro": {"x": [0, 1], "y": [0, 1]}}',
        '{"pro": [[0, 1], [0]]}',
        '{"pro": [[0, 1], [0, 1], [0, 1]]}',
        '{"pro": [[0], [1]]}',
        '{"pro": [[0, 1], [0.5, 0.25]]}',
        '{"pro": [[0, 1], [0, 1.5]]}',
        '{"pro": [[0, 1], [0, "x"]]}',
        '{"pro": [[0, NaN], [0, 1]]}',
    ],
)
def test_invalid_curves_are_refused(tmp_path, text):
    (tmp_path / "curves.json").write_text(text)
    expected = (
        f"{tmp_path / 'curves.json'} is damaged: pro must be two rows of rising rates in 0..1"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_curves(tmp_path)
