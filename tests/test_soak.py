"""Thousands of calls leave neither memory nor open files behind; the long run is ``benchmarks/soak.py``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc shows"),
]


@pytest.mark.parametrize(("calls", "count"), [("op_calls", 8_000), ("predictions", 30)])
def test_many_calls_leave_nothing_behind(monkeypatch, calls, count):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    soak = importlib.import_module("benchmarks.soak")
    found = soak.soak(getattr(soak, calls)(), count, 60.0)
    assert found["open_files_growth"] <= 0
    assert found["resident_growth_bytes"] < 8e6
