"""Bias map, LayerNorm over channels and ReLU, compared with eager and compiled PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPES, LAYOUTS, normal, run_in_pytest, scales, widened
from msflow_ext import ops
from msflow_ext.bench import Case, Provider
from msflow_ext.bench.modes import compiled
from msflow_ext.ops.norm import channel_norm_reference

COND = 64
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


def test_norm(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    """Return cases with the hidden channels of the subnets, cached at batch 1, and from memory at batch 8."""
    return [
        make(dtype, layout, channels // 2 + COND, side, batch)
        for batch in (1, 8)
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels, side in scales(quick)
    ]


def make(dtype: str, layout: str, channels: int, side: int, batch: int) -> Case:
    hot = batch == 1
    tolerance = TOLERANCES[dtype]
    providers = {
        "eager": Provider(lambda: eager, tolerance),
        "ours": Provider(lambda: ours, tolerance),
    }
    if hot:
        providers["compile"] = Provider(lambda: compiled(to_compile), tolerance, slow=True)

    def inputs() -> list[Tensor]:
        """Return x, weight, bias, and the bias map in float32 and in the dtype of x; each provider uses one."""
        x = normal(batch, channels, side, side, dtype=DTYPES[dtype], layout=layout)
        bias_map = normal(1, channels, side, side, layout=layout).to(DTYPES[dtype])
        vectors = [torch.rand(channels) + 0.5, torch.randn(channels)]
        return [x, *vectors, bias_map.float(), bias_map]

    positions = channels * side * side
    return Case(
        name=f"norm {dtype} {layout} {channels}x{side}x{side} b{batch}",
        inputs=inputs,
        providers=providers,
        expected=lambda *given: reference(*widened(given)),
        bytes=positions * (2 * batch * DTYPES[dtype].itemsize + 4),
        hot=hot,
    )


def ours(x: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor, _: Tensor) -> Tensor:
    return ops.channel_norm(x, weight, bias, bias_map)


def reference(x: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor, _: Tensor) -> Tensor:
    return channel_norm_reference(x, weight, bias, bias_map, True, 1e-5)


def eager(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor, bias_map: Tensor) -> Tensor:
    """Normalize on the NHWC view, which is no copy for channels_last; the result keeps that layout."""
    h = (x + bias_map).permute(0, 2, 3, 1)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(h, h.shape[-1:], weight, bias).relu_().permute(0, 3, 1, 2)


def to_compile(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor, bias_map: Tensor) -> Tensor:
    h = (x + bias_map).permute(0, 2, 3, 1)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.relu(F.layer_norm(h, h.shape[-1:], weight, bias)).permute(0, 3, 1, 2)
