"""Winograd's 3x3 convolutions of the flows' subnets, compared with eager and optimized direct ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from benchmarks.harness import DTYPES, normal, run_in_pytest
from msflow_ext import ops
from msflow_ext.bench import Case, Provider
from msflow_ext.models.conv import packed

TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}

# Side, input and output channels of the first and second convolutions of the three scales' subnets.
SHAPES = [
    (64, 128, 192),
    (64, 192, 256),
    (32, 256, 320),
    (32, 320, 512),
    (16, 512, 576),
    (16, 576, 1024),
]


def test_winograd(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    """Return cases in channels_last with batch 1 and 4, and with batch 8 for the gradient of the weight."""
    shapes = [(8, 32, 48), (8, 64, 64)] if quick else SHAPES
    return [
        *(make(dtype, *shape, batch) for batch in (1, 4) for dtype in DTYPES for shape in shapes),
        *(gradient(dtype, *shape) for dtype in DTYPES for shape in shapes),
    ]


def make(dtype: str, side: int, c_in: int, c_out: int, batch: int) -> Case:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1).requires_grad_(False)
    tolerance = TOLERANCES[dtype]
    return Case(
        name=f"winograd {dtype} {c_in}->{c_out} {side}x{side} b{batch}",
        inputs=lambda: [normal(batch, c_in, side, side, dtype=DTYPES[dtype], layout="nhwc")],
        providers={
            "eager": Provider(lambda: eager(conv, DTYPES[dtype]), tolerance),
            "optimized": Provider(lambda: direct(conv, DTYPES[dtype]), tolerance),
            "tiles of 2": Provider(lambda: tiles(conv, DTYPES[dtype], 2), tolerance),
            "tiles of 4": Provider(lambda: tiles(conv, torch.float32, 4), tolerance),
            "ours": Provider(lambda: packed.PackedConv2d(conv, DTYPES[dtype]), tolerance),
        },
        expected=lambda x: F.conv2d(
            x.double(), conv.weight.double(), bias_of(conv).double(), padding=1
        ),
        hot=True,
    )


def gradient(dtype: str, side: int, c_in: int, c_out: int, batch: int = 8) -> Case:
    """Return the case of the weight's gradient, with PyTorch's op in both memory formats."""
    weight = torch.empty(c_out, c_in, 3, 3, dtype=DTYPES[dtype])
    tolerance, contiguous = TOLERANCES[dtype], {}

    def inputs() -> list[Tensor]:
        sizes = (batch, c_in, side, side), (batch, c_out, side, side)
        return [normal(*size, dtype=DTYPES[dtype], layout="nhwc") for size in sizes]

    def autograd(x: Tensor, grad: Tensor) -> Tensor:
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry)[1]

    def autograd_nchw(x: Tensor, grad: Tensor) -> Tensor:
        if not contiguous:  # as in an eager network
            contiguous.update(x=x.contiguous(), grad=grad.contiguous())
        return autograd(**contiguous)

    return Case(
        name=f"winograd weight gradient {dtype} {c_in}->{c_out} {side}x{side} b{batch}",
        inputs=inputs,
        providers={
            "eager": Provider(lambda: autograd_nchw, tolerance, bf16=dtype == "bf16"),
            "eager channels_last": Provider(lambda: autograd, tolerance, bf16=dtype == "bf16"),
            "ours": Provider(lambda: ops.winograd_weight_grad, tolerance),
        },
        expected=lambda x, grad: conv2d_weight(x.double(), weight.shape, grad.double(), padding=1),
        hot=True,
    )


def eager(conv: nn.Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = conv.weight.to(dtype, memory_format=torch.channels_last)
    bias = bias_of(conv).to(dtype)
    return lambda x: F.conv2d(x, weight, bias, padding=1)


def direct(conv: nn.Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the convolution that freezing in torch makes."""
    weight = conv.weight.to(dtype, memory_format=torch.channels_last)
    bias, optimized = bias_of(conv).to(dtype), []
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def run(x: Tensor) -> Tensor:
        if not optimized:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            optimized.append(pack(weight, *geometry, list(x.shape)))
        return torch.ops.mkldnn._convolution_pointwise(
            x, optimized[0], bias, *geometry, "none", [], ""
        )

    return run


def tiles(conv: nn.Conv2d, factors: torch.dtype, tile: int) -> Callable[[Tensor], Tensor]:
    weight, bias = ops.winograd_weight(conv.weight, tile, factors), bias_of(conv)
    return lambda x: ops.winograd_conv2d(x, weight, bias)


def bias_of(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
