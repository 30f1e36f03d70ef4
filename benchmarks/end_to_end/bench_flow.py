"""Inference of the flows, without the backbone, for several batch sizes and image sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import run_in_pytest, without_slow
from msflow_ext.bench import TINY, Case
from msflow_ext.bench.cases import flows


def test_flow(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [flows(batch=batch, **TINY) for batch in (1, 2)]
    batches = [flows(512, 1), flows(512, 4), flows(512, 8)]
    return [*batches, *(without_slow(flows(size)) for size in (256, 384))]
