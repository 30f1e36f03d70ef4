"""Properties of the resampling: kernels equal the reference, which equals torch's pooling and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext import ops
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Sizes of a map and of the result of pooling.
SIZES = {
    "whole-windows": ((8, 12), (4, 3)),
    "overlapping-windows": ((7, 11), (3, 4)),
    "same": ((5, 6), (5, 6)),
    "to-one-pixel": ((9, 5), (1, 1)),
    "one-pixel": ((1, 1), (1, 1)),
    "wider-than-it": ((3, 10), (5, 4)),
    "one-row": ((1, 13), (1, 6)),
}


# Dtypes of a map and of the coarse map that is added.
PAIRS = {
    "float32": (F32, F32),
    "float64": (F64, F64),
    "bfloat16": (BF16, BF16),
    "bfloat16-onto-float32": (F32, BF16),
}


@pytest.fixture(params=[F32, F64, BF16], ids=["float32", "float64", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_pooling_kernels_equal_the_reference(
    equals_reference: Any, normal: Normal, size: str, layout: Layout, dtype: torch.dtype
) -> None:
    high, low = SIZES[size]
    maps = ((16, high), (3, high), (1, low), (17, (6, 5)))
    x = [layout(normal(2, c, *s, dtype=dtype)) for c, s in maps]
    equals_reference(
        lambda *t: (ops.pool_and_concatenate(t, low),), x, [high[0] * high[1]] * 5, layout
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("channels", [16, 19])
def test_upsampling_kernels_equal_the_reference(
    equals_reference: Any,
    normal: Normal,
    size: str,
    layout: Layout,
    dtypes: tuple[torch.dtype, torch.dtype],
    channels: int,
) -> None:
    pairs = zip(SIZES[size], dtypes, strict=True)
    operands = [layout(normal(2, channels, *s, dtype=d)) for s, d in pairs]
    terms = [5, 1, 4 * math.prod(SIZES[size][0])]
    equals_reference(lambda *t: (ops.upsample_and_add(*t),), operands, terms, layout)


@pytest.mark.parametrize("size", SIZES)
def test_results_equal_the_pooling_and_interpolation_of_torch(
    each_backend: str, normal: Normal, size: str
) -> None:
    high, low = SIZES[size]
    x, y = normal(2, 3, *high, dtype=F64), normal(2, 5, *low, dtype=F64)
    got = ops.pool_and_concatenate([x, y], low)
    expected = torch.cat([F.adaptive_avg_pool2d(x, low), y], 1)
    assert relative_error(got, expected) <= tolerance(F64, high[0] * high[1])
    got = ops.upsample_and_add(x, y[:, 1:4])
    expected = x + F.interpolate(y[:, 1:4], high, mode="bilinear", align_corners=True)
    assert relative_error(got, expected) <= tolerance(F64, 5)


def test_maps_of_different_layouts_give_the_format_of_the_first(
    native: None, normal: Normal
) -> None:
    x, y = normal(2, 3, 4, 4), normal(2, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    assert ops.pool_and_concatenate([x, y], (2, 2)).is_contiguous()
    got = ops.pool_and_concatenate([y, x], (2, 2))
    assert got.is_contiguous(memory_format=torch.channels_last)
    expected = torch.cat([y, F.adaptive_avg_pool2d(x, (2, 2))], 1)
    assert relative_error(got, expected) <= tolerance(F32, 4)


def test_adding_to_float32_equals_casts_bit_for_bit(
    each_backend: str, normal: Normal, layout: Layout
) -> None:
    x = layout(normal(2, 19, 7, 11)).requires_grad_()
    low = layout(normal(2, 19, 3, 4, dtype=BF16)).requires_grad_()
    y, cast = ops.upsample_and_add(x, low), ops.upsample_and_add(x, low.float()).to(BF16)
    assert y.dtype is BF16
    assert y.stride() == cast.stride()
    upstream = normal(*y.shape, dtype=BF16)
    got, expected = (torch.autograd.grad(r, (x, low), upstream) for r in (y, cast))
    assert [g.dtype for g in got] == [F32, BF16]
    assert all(map(torch.equal, (y, *got), (cast, *expected)))


def test_a_non_finite_gradient_reaches_only_the_inputs_of_its_result(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    x, low = (memory_format(normal(1, 8, n, n)).requires_grad_() for n in (16, 4))
    upstream = memory_format(x.new_zeros(1, 8, 16, 16))
    upstream[:, :, 6, 6] = math.inf  # between the second and the third low pixel, along both axes
    _, got = torch.autograd.grad(ops.upsample_and_add(x, low), (x, low), upstream)
    reached = torch.zeros(4, 4, dtype=torch.bool)
    reached[1:3, 1:3] = True
    assert torch.equal(~got.isfinite().cpu(), reached.expand_as(got))


def test_any_number_of_scales_is_pooled(each_backend: str, normal: Normal) -> None:
    x = [normal(2, 1, 2 + i, 3) for i in range(19)]
    expected = torch.cat([F.adaptive_avg_pool2d(t, (2, 2)) for t in x], 1)
    assert relative_error(ops.pool_and_concatenate(x, (2, 2)), expected) <= tolerance(F32, 60)


def test_an_empty_batch_stays_empty(each_backend: str) -> None:
    x, low = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(0, 3, 2, 2)
    y = ops.upsample_and_add(x, ops.pool_and_concatenate([x], (2, 2)) + low)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    assert x.grad is not None and x.grad.shape == x.shape


def test_derivatives_equal_finite_differences(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    x, y = (memory_format(normal(2, 2, *s, dtype=F64)).requires_grad_() for s in ((5, 3), (2, 2)))
    for op in (lambda x, y: ops.pool_and_concatenate([x, y], (2, 2)), ops.upsample_and_add):
        assert torch.autograd.gradcheck(op, (x, y))
        assert torch.autograd.gradgradcheck(op, (x, y))


X = torch.zeros
REFUSED: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "no map": (
        lambda: ops.pool_and_concatenate([], (2, 2)),
        ValueError,
        "x must hold at least one map, got none",
    ),
    "size 0": (
        lambda: ops.pool_and_concatenate([X(1, 1, 2, 2)], (2, 0)),
        ValueError,
        r"size must be at least 1, got \(2, 0\)",
    ),
    "other batches": (
        lambda: ops.pool_and_concatenate([X(1, 1, 2, 2), X(2, 1, 2, 2)], (2, 2)),
        ValueError,
        r"with equal N, got \[\(1, 1, 2, 2\), \(2, 1, 2, 2\)\]",
    ),
    "mixed dtypes": (
        lambda: ops.pool_and_concatenate([X(1, 1, 2, 2), X(1, 1, 2, 2, dtype=F64)], (2, 2)),
        TypeError,
        "same floating-point dtype for all maps",
    ),
    "mixed devices": (
        lambda: ops.pool_and_concatenate([X(1, 1, 2, 2), X(1, 1, 2, 2, device="meta")], (2, 2)),
        ValueError,
        "on the same device for all maps",
    ),
    "vectors": (
        lambda: ops.upsample_and_add(X(1, 1), X(1, 1)),
        ValueError,
        r"with equal N and C, got \(1, 1\) and \(1, 1\)",
    ),
    "other channels": (
        lambda: ops.upsample_and_add(X(1, 2, 4, 4), X(1, 3, 2, 2)),
        ValueError,
        "with equal N and C",
    ),
    "empty map": (
        lambda: ops.upsample_and_add(X(1, 2, 4, 4), X(1, 2, 0, 2)),
        ValueError,
        "must not be empty",
    ),
    "whole numbers": (
        lambda: ops.upsample_and_add(*[X(1, 2, 2, 2, dtype=torch.int64)] * 2),
        TypeError,
        "same floating-point dtype, .* got torch.int64",
    ),
    "elsewhere": (
        lambda: ops.upsample_and_add(X(1, 2, 4, 4), X(1, 2, 2, 2, device="meta")),
        ValueError,
        "on the same device, got cpu and meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(each_backend: str, case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
