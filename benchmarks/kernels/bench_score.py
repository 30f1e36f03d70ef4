"""Likelihood maps, and anomaly maps and scores of several scales, compared with eager and compiled PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, LAYOUTS, normal, run_in_pytest, scales
from msflow_ext import ops
from msflow_ext.bench import Case, Provider
from msflow_ext.bench.modes import compiled
from msflow_ext.bench.reference import predict


def test_score(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    likelihood = [
        likelihood_case(dtype, layout, channels, side)
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels, side in scales(quick)
    ]
    size = 64 if quick else 512
    return [*likelihood, *(aggregation_case(size, batch) for batch in (1, 8))]


def likelihood_case(dtype: str, layout: str, channels: int, side: int) -> Case:
    def eager(z: Tensor) -> Tensor:
        return -0.5 * z.square().mean(1)

    def narrow(z: Tensor) -> Tensor:
        return -0.5 * z.square().mean(1, dtype=torch.float32)

    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    return Case(
        name=f"likelihood {dtype} {layout} {channels}x{side}x{side} b8",
        inputs=lambda: [normal(8, channels, side, side, dtype=DTYPES[dtype], layout=layout)],
        providers={
            "eager": Provider(lambda: eager if dtype == "fp32" else narrow, tolerance),
            "ours": Provider(lambda: ops.log_likelihood_map, tolerance),
        },
        expected=lambda z: eager(z.double()),
        bytes=8 * channels * side * side * DTYPES[dtype].itemsize,
    )


def aggregation_case(size: int, batch: int) -> Case:
    sides = [size // 8, size // 16, size // 32]

    def reference(*maps: Tensor) -> list[Tensor]:
        found = predict(maps, size)
        return [found.score, found.anomaly_map, found.image_map]

    def ours(*maps: Tensor) -> list[Tensor]:
        found = ops.aggregate(maps, size)
        return [found.score, found.anomaly_map, found.image_map]

    return Case(
        name=f"aggregation {size} px b{batch}",
        inputs=lambda: [-normal(batch, s, s).square() for s in sides],
        providers={
            "reference": Provider(lambda: reference),
            "compile": Provider(lambda: compiled(reference), slow=True),
            "ours": Provider(lambda: ours),
        },
        expected="reference",
        hot=True,
    )
