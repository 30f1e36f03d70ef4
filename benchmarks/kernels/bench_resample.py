"""Pooling and upsampling of the fusion flow, forward and backward, compared with eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    DTYPES,
    LAYOUTS,
    backward_of,
    normal,
    run_in_pytest,
    scales,
    widened,
)
from msflow_ext import ops
from msflow_ext.bench import Case, Provider
from msflow_ext.bench.modes import compiled

TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


def test_resample(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    """Return cases that resample halves of all scales to the coarsest size and back, with a batch of 8."""
    return [
        make(what, backward, dtype, layout, scales(quick))
        for what in ("pooling", "upsampling")
        for backward in (False, True)
        for dtype in DTYPES
        for layout in LAYOUTS
    ]


def make(
    what: str, backward: bool, dtype: str, layout: str, sizes: Sequence[tuple[int, int]]
) -> Case:
    low = sizes[-1][1]
    channels = [c // 2 for c, _ in sizes]
    eager, ours = FUNCTIONS[what]

    def inputs() -> list[Tensor]:
        """Return maps of all scales, for upsampling the coarse maps too, and for backward the results' gradients."""
        options = {"dtype": DTYPES[dtype], "layout": layout}
        maps = [normal(8, c // 2, side, side, **options) for c, side in sizes]
        coarse = [normal(8, sum(channels), low, low, **options)]
        given = maps if what == "pooling" else maps + coarse
        if not backward:
            return given
        results = coarse if what == "pooling" else maps
        return [t.requires_grad_() for t in given] + [t.detach().clone() for t in results]

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        count = 1 if what == "pooling" else len(sizes)
        return backward_of(function, count) if backward else function

    return Case(
        name=f"{what} {'backward' if backward else 'forward'} {dtype} {layout} b8",
        inputs=inputs,
        providers={
            "eager": Provider(lambda: run(eager), TOLERANCES[dtype]),
            "compile": Provider(lambda: run(compiled(eager)), TOLERANCES[dtype], slow=True),
            "ours": Provider(lambda: run(ours), TOLERANCES[dtype]),
        },
        expected=lambda *given: run(eager)(*widened(given)),
        grad=backward,
    )


def pool(*maps: Tensor) -> Tensor:
    size = (maps[-1].size(2), maps[-1].size(3))
    return torch.cat([F.adaptive_avg_pool2d(t, size) for t in maps], 1)


def our_pool(*maps: Tensor) -> Tensor:
    return ops.pool_and_concatenate(maps, (maps[-1].size(2), maps[-1].size(3)))


def upsample(*given: Tensor) -> list[Tensor]:
    *maps, coarse = given
    parts = coarse.split([t.size(1) for t in maps], 1)
    return [
        t + F.interpolate(c, t.shape[2:], mode="bilinear", align_corners=True)
        for t, c in zip(maps, parts, strict=True)
    ]


def our_upsample(*given: Tensor) -> list[Tensor]:
    *maps, coarse = given
    parts = coarse.split([t.size(1) for t in maps], 1)
    return [ops.upsample_and_add(t, c) for t, c in zip(maps, parts, strict=True)]


FUNCTIONS = {"pooling": (pool, our_pool), "upsampling": (upsample, our_upsample)}
