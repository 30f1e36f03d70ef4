"""Affine coupling, its inverse and its backward pass, compared with a copy, eager and compiled PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
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
from msflow_ext.ops.coupling import affine_coupling_inverse_reference, affine_coupling_reference

CLAMP = 1.9
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


def test_coupling(benchmark: Any, case: Case, provider: str) -> None:
    run_in_pytest(benchmark, case, provider)


def cases(quick: bool) -> list[Case]:
    """Return cases with cached buffers at batch 1, and from memory at batch 8."""
    return [
        make(direction, dtype, layout, channels, side, batch)
        for batch in (1, 8)
        for direction in ("forward", "inverse", "backward")
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels, side in scales(quick)
    ]


def make(direction: str, dtype: str, layout: str, channels: int, side: int, batch: int) -> Case:
    hot = batch == 1
    back = direction == "backward"
    ours, for_eager, to_compile, truth = {
        "forward": (forward, eager_forward, eager, reference),
        "inverse": (inverse, eager_inverse, eager_inverse, reference_inverse),
        "backward": (forward, eager, eager, reference),
    }[direction]

    def provider(function: Callable[..., Any], **options: Any) -> Provider:
        def make() -> Callable[..., Any]:
            run = fast(function) if options else function
            return backward_of(run, 3) if back else run

        return Provider(make, TOLERANCES[dtype], **options)

    def expected(*given: Tensor) -> Any:
        return (backward_of(truth, 3) if back else truth)(*widened(given))

    providers = {"eager": provider(for_eager), "ours": provider(ours)}
    if hot:
        providers["compile"] = provider(to_compile, slow=True)

    def inputs() -> list[Tensor]:
        options = {"dtype": DTYPES[dtype], "layout": layout}
        shape = (batch, channels // 2, side, side)
        x1, x2 = normal(*shape, **options), normal(*shape, **options)
        a = normal(batch, channels, side, side, **options)
        affine = [torch.rand(channels) + 0.5, torch.randn(channels)]
        given = [x1, x2, a, *affine, torch.randperm(channels)]
        if not back:
            return given
        leaves = [t.requires_grad_(t.is_floating_point()) for t in given]
        return [*leaves, normal(*shape, **options), normal(*shape, **options), torch.ones(batch)]

    # For C channels, forward reads x and a and writes y. The inverse reads half of y and a, and writes half of x.
    # Backward reads the gradient of y, x and a, and writes the gradients of x and a.
    tensors = {"forward": 3, "inverse": 2, "backward": 5}[direction]
    return Case(
        name=f"coupling {direction} {dtype} {layout} {channels}x{side}x{side} b{batch}",
        inputs=inputs,
        providers=providers,
        expected=expected,
        bytes=tensors * batch * channels * side * side * DTYPES[dtype].itemsize,
        hot=hot,
        grad=back,
    )


def forward(x1: Tensor, x2: Tensor, a: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ops.affine_coupling(x1, x2, a, *affine, clamp=CLAMP)


def inverse(y1: Tensor, y2: Tensor, a: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor]:
    return ops.affine_coupling_inverse(y1, y2, a, *affine, clamp=CLAMP)


def reference(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, perm: Tensor):
    end = (math.inf, x1.size(1))
    return affine_coupling_reference(x1, x2, a, scale, offset, perm, CLAMP, "0.2", *end)


def reference_inverse(y1: Tensor, y2: Tensor, a: Tensor, s: Tensor, offset: Tensor, perm: Tensor):
    return affine_coupling_inverse_reference(y1, y2, a, s, offset, perm, CLAMP, "0.2")


def eager_forward(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, perm: Tensor):
    """Compute the coupling in place where only the result is needed."""
    a_s, a_t = a.chunk(2, 1)
    s = torch.tanh(0.1 * a_s).mul_(CLAMP)
    log_det = _log_det(s, scale)
    u = torch.cat((x1, s.exp_().mul_(x2).add_(a_t, alpha=0.1)), 1)
    y = u.mul_(scale.view(-1, 1, 1)).add_(offset.view(-1, 1, 1))[:, perm]
    return (*y.split(x1.size(1), 1), log_det)


def eager(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, perm: Tensor):
    """Compute the coupling as FrEIA's master, differentiably."""
    a_s, a_t = a.chunk(2, 1)
    s = CLAMP * torch.tanh(0.1 * a_s)
    u = torch.cat((x1, x2 * torch.exp(s) + 0.1 * a_t), 1)
    scale_x, offset_x = (v.view(-1, 1, 1).to(u.dtype) for v in (scale, offset))
    y = (u * scale_x + offset_x)[:, perm]
    return (*y.split(x1.size(1), 1), _log_det(s, scale))


def eager_inverse(y1: Tensor, y2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, perm: Tensor):
    """Compute only the transformed half, as the op does, which gathers half of the channels."""
    transformed = torch.argsort(perm)[y1.size(1) :]
    u = torch.cat((y1, y2), 1)[:, transformed]
    a_s, a_t = a.chunk(2, 1)
    s = CLAMP * torch.tanh(0.1 * a_s)
    scale_x, offset_x = (v[y1.size(1) :].view(-1, 1, 1).to(u.dtype) for v in (scale, offset))
    x2 = ((u - offset_x) / scale_x - 0.1 * a_t) * torch.exp(-s)
    return x2, -_log_det(s, scale)


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function, whose graph may be differentiated many times."""
    import torch._functorch.config

    run = compiled(function)

    def kept(*inputs: Tensor) -> Any:
        with torch._functorch.config.patch(donated_buffer=False):
            return run(*inputs)

    return kept


def _log_det(s: Tensor, scale: Tensor) -> Tensor:
    positions = s.size(2) * s.size(3)
    return s.sum((1, 2, 3), dtype=torch.float32 if s.itemsize < 4 else s.dtype) + (
        positions * torch.log(scale).sum()
    )
