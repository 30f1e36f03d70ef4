"""Properties of the channel norm: kernels equal the reference, which equals torch's LayerNorm, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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

# (samples, channels, positions). A block has at most 64 positions and 16 lanes.
SHAPES = {
    "even": (2, 8, (4, 8)),
    "odd-channels": (2, 7, (5, 3)),
    "one-pixel": (3, 5, (1, 1)),
    "many-blocks": (2, 19, (13, 17)),
    "tail-lanes": (1, 37, (67, 1)),
    "whole-packets": (2, 32, (8, 10)),
    "two-or-three-packets-a-lane": (5, 320, (2, 4)),
    "three-or-five-packets-a-lane": (2, 576, (2, 4)),
    "more-channels-than-shared-memory-holds": (1, 4100, (3, 1)),
    "one-channel": (2, 1, (3, 3)),
    "empty-batch": (0, 4, (2, 2)),
    "no-positions": (2, 4, (0, 5)),
    "vectors": (5, 6, ()),
    "sequences": (2, 6, (7,)),
    "volumes": (2, 3, (2, 3, 4)),
}


@pytest.fixture(params=[F32, F64, BF16], ids=["float32", "float64", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def make(
    normal: Normal, shape: str, dtype: torch.dtype, layout: Layout = Tensor.contiguous
) -> list[Tensor]:
    """Return x with a mean other than zero, weight, bias and a bias map."""
    n, c, positions = SHAPES[shape]
    accumulation = ops.accumulation_dtype(dtype)
    x = (normal(n, c, *positions) * 2 + 1).to(dtype)
    bias_map = layout(normal(1, c, *positions, dtype=dtype))
    return [layout(x), normal(c, dtype=accumulation), normal(c, dtype=accumulation), bias_map]


def terms(shape: str) -> list[int]:
    """Return how many numbers are summed by y and the gradients of x, weight, bias and bias_map."""
    n, c, positions = SHAPES[shape]
    pixels = math.prod(positions)
    return [c, c, n * pixels * c, n * pixels, n * c]


def normalized(*operands: Tensor, relu: bool = True, eps: float = 1e-5) -> tuple[Tensor]:
    return (ops.channel_norm(*operands, relu=relu, eps=eps),)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_with_a_bias_map(
    equals_reference: Any,
    normal: Normal,
    shape: str,
    layout: Layout,
    dtype: torch.dtype,
    relu: bool,
) -> None:
    operands = make(normal, shape, dtype, layout)
    equals_reference(partial(normalized, relu=relu), operands, terms(shape), layout)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_without_a_bias_map(
    equals_reference: Any,
    normal: Normal,
    shape: str,
    memory_format: Layout,
    dtype: torch.dtype,
) -> None:
    operands = make(normal, shape, dtype, memory_format)[:3]
    equals_reference(partial(normalized, eps=0.1), operands, terms(shape)[:4], memory_format)


@pytest.mark.parametrize("with_map", [True, False], ids=["map", "bare"])
def test_kernels_equal_the_reference_if_a_warp_processes_several_samples(
    equals_reference: Any, normal: Normal, with_map: bool
) -> None:
    n, c, size = 5, 8, (52, 54)
    channels_last = partial(Tensor.contiguous, memory_format=torch.channels_last)
    vectors = [normal(c), normal(c)]
    maps = [channels_last(normal(1, c, *size))] if with_map else []
    operands = [channels_last(normal(n, c, *size, dtype=BF16)), *vectors, *maps]
    pixels = math.prod(size)
    numbers = [c, c, n * pixels * c, n * pixels, n * c]
    equals_reference(normalized, operands, numbers[: 4 + with_map], channels_last)


def test_the_bias_map_may_have_another_dtype_and_memory_format(
    equals_reference: Any, normal: Normal, memory_format: Layout
) -> None:
    x, weight, bias, _ = make(normal, "even", BF16)
    bias_map = normal(*x[:1].shape, dtype=F32)
    operands = [x, weight, bias, memory_format(bias_map)]
    equals_reference(normalized, operands, terms("even"))


@pytest.mark.parametrize("shape", ["even", "vectors", "sequences", "volumes"])
def test_the_norm_equals_layer_norm_over_channels_and_relu(
    each_backend: str, normal: Normal, shape: str
) -> None:
    x, weight, bias, bias_map = make(normal, shape, F64)
    last = (x + bias_map).movedim(1, -1)
    expected = F.relu(F.layer_norm(last, x.shape[1:2], weight, bias, eps=1e-3)).movedim(-1, 1)
    got = ops.channel_norm(x, weight, bias, bias_map, eps=1e-3)
    assert relative_error(got, expected) <= tolerance(F64, x.size(1))
    linear = ops.channel_norm(x, weight, bias, bias_map, eps=1e-3, relu=False)
    assert torch.equal(linear.clamp_min(0), got)
    assert bool((linear < 0).any())


def test_a_large_common_offset_adds_no_more_than_its_rounding(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    x, weight, bias, _ = make(normal, "many-blocks", F32)
    shifted = memory_format((x + 4096).round(decimals=2))
    got = ops.channel_norm(shifted, weight, bias)
    with ops.backend("reference"):
        expected = ops.channel_norm(shifted.double(), weight.double(), bias.double())
    assert relative_error(got, expected) <= 4096 * tolerance(F32)


@pytest.mark.parametrize("shape", ["even", "odd-channels", "vectors", "sequences", "volumes"])
def test_results_and_gradients_have_dtype_and_memory_format_of_their_operands(
    native: None, normal: Normal, shape: str, memory_format: Layout, dtype: torch.dtype
) -> None:
    leaves = [t.requires_grad_() for t in make(normal, shape, dtype, memory_format)]
    y = ops.channel_norm(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    accumulation = ops.accumulation_dtype(dtype)
    assert [t.dtype for t in (y, *grads)] == [dtype, dtype, accumulation, accumulation, dtype]
    for result in (y, grads[0], grads[3]):
        if memory_format.__name__ == "channels_last":
            result = result.movedim(1, -1)
        assert result.is_contiguous()


@pytest.mark.parametrize("with_map", [True, False], ids=["map", "bare"])
def test_first_and_second_derivatives_equal_finite_differences(
    native: None, normal: Normal, with_map: bool, memory_format: Layout
) -> None:
    x, weight, bias, bias_map = (t.requires_grad_() for t in make(normal, "vectors", F64))
    x = memory_format(x.detach()[:2, :, None]).requires_grad_()
    bias_map = bias_map.detach()[..., None].requires_grad_() if with_map else None

    def norm(*t: Tensor) -> Tensor:
        return ops.channel_norm(*t, eps=0.1)

    inputs: Any = (x, weight, bias, bias_map)
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_kernels_equal_the_reference_on_non_finite_and_huge_input(
    native: None, normal: Normal, value: float, memory_format: Layout
) -> None:
    x, weight, bias, bias_map = make(normal, "even", F32, memory_format)
    x[1, 3, 2, 1] = bias_map[0, 5, 3, 3] = value
    got = ops.channel_norm(x, weight, bias, bias_map)
    with ops.backend("reference"):
        expected = ops.channel_norm(x, weight, bias, bias_map)
    assert int(expected.isnan().sum()) in (0, 8 + 2 * 8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


X = torch.zeros
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one dimension": (
        {"x": X(3)},
        ValueError,
        r"x must have shape \(N, C, \*\) with C >= 1, got \(3,\)",
    ),
    "no channel": ({"x": X(2, 0, 4)}, ValueError, r"with C >= 1, got \(2, 0, 4\)"),
    "whole numbers": (
        {"x": X(2, 3, 4, dtype=torch.int64)},
        TypeError,
        "x must have a floating-point dtype",
    ),
    "short weight": ({"weight": X(2)}, ValueError, r"weight must have shape \(3,\), one value"),
    "long bias": ({"bias": X(4)}, ValueError, r"bias must have shape \(3,\), .* got \(4,\)"),
    "weight in bfloat16": ({"weight": X(3, dtype=BF16)}, TypeError, "weight must be torch.float32"),
    "bias in float64": ({"bias": X(3, dtype=F64)}, TypeError, "bias must be torch.float32"),
    "weight elsewhere": ({"weight": X(3, device="meta")}, ValueError, "weight must be on cpu"),
    "map per sample": (
        {"bias_map": X(2, 3, 4)},
        ValueError,
        r"bias_map must have shape \(1, 3, 4\)",
    ),
    "map of another size": ({"bias_map": X(1, 3, 5)}, ValueError, r"got \(1, 3, 5\)"),
    "map of another dtype": ({"bias_map": X(1, 3, 4, dtype=F64)}, TypeError, "bias_map must be"),
    "map elsewhere": ({"bias_map": X(1, 3, 4, device="meta")}, ValueError, "bias_map must be on"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be at least 0, got -1e-05"),
    "eps nan": ({"eps": math.nan}, ValueError, "eps must be at least 0, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_norm_refuses_arguments_that_do_not_fit(each_backend: str, case: str) -> None:
    bad, error, message = REFUSED[case]
    good: dict[str, Any] = {"x": X(2, 3, 4), "weight": X(3), "bias": X(3)}
    with pytest.raises(error, match=message):
        ops.channel_norm(**(good | bad))
