"""The pipeline from images to scores, for several image sizes and batch sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import run_in_pytest, without_slow
from msflow_ext.bench import Case
from msflow_ext.bench.cases import pipeline


def test_pipeline(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [pipeline(64, batch, backbone="resnet18", blocks=(1, 1)) for batch in (1, 2)]
    scaling = [(256, 1), (384, 1), (512, 2), (512, 4), (512, 8)]
    return [
        pipeline(512, 1),
        *(without_slow(pipeline(size, batch)) for size, batch in scaling),
    ]
