"""Properties of the coupling's likelihood map: it equals the map of the coupling's results before rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Dtypes of the stream and of the subnet's output.
DTYPES = {
    "float32": (F32, F32),
    "float64": (F64, F64),
    "bfloat16": (BF16, BF16),
    "bfloat16-subnet": (F32, BF16),
}

# (samples, conditioning, transformed, positions). On the CPU a block has 64 positions and 16 lanes. On CUDA a packet has
# 16 bytes, a warp processes 32 packets of a position at a time, and a block processes 16 positions.
SHAPES = {
    "even": (2, 4, 4, (4, 6)),
    "odd-channels": (2, 4, 3, (5, 3)),
    "one-pixel": (3, 5, 4, (1, 1)),
    "many-blocks": (2, 9, 8, (21, 19)),
    "whole-packets": (2, 16, 16, (8, 40)),
    "many-channels": (1, 300, 260, (3, 3)),
    "empty-batch": (0, 4, 3, (2, 2)),
    "no-conditioning-channels": (2, 0, 6, (3, 5)),
    "no-transformed-channels": (2, 3, 0, (3, 5)),
    "no-positions": (2, 4, 3, (0, 5)),
    "vectors": (5, 4, 3, ()),
    "volumes": (2, 3, 3, (2, 3, 4)),
}


@pytest.fixture(params=DTYPES)
def dtypes(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    return DTYPES[request.param]


def make(
    normal: Normal,
    shape: str = "odd-channels",
    dtypes: tuple[torch.dtype, torch.dtype] = (F64, F64),
    layout: Layout = Tensor.contiguous,
) -> list[Tensor]:
    """Return x1, x2, a, scale and offset."""
    n, c1, c2, positions = SHAPES[shape]
    x, a = dtypes
    accumulation = ops.accumulation_dtype(x)
    halves = [normal(n, c, *positions, dtype=x) for c in (c1, c2)]
    subnet = 6 * normal(n, 2 * c2, *positions, dtype=a)
    vectors = [normal(c1 + c2, dtype=accumulation).exp(), normal(c1 + c2, dtype=accumulation)]
    return [*map(layout, (*halves, subnet)), *vectors]


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_in_every_shape_and_layout(
    equals_reference: Any, normal: Normal, shape: str, layout: Layout, dtypes: Any
) -> None:
    n, c1, c2, positions = SHAPES[shape]
    sums = n * math.prod(positions)

    def likelihood(*operands: Tensor) -> tuple[Tensor]:
        return (ops.coupling_log_likelihood(*operands, clamp=1.9, limit=1.5),)

    terms = [c1 + c2, 1, 1, 1, sums, sums]
    equals_reference(likelihood, make(normal, shape, dtypes, layout), terms)


@pytest.mark.parametrize("vectors", ["bare", "scale", "offset", "affine"])
@pytest.mark.parametrize("form", ["0.2", "head", "atan"])
@pytest.mark.parametrize("limit", [math.inf, 2.0])
def test_it_equals_the_map_of_the_couplings_results_with_every_option(
    each_backend: str,
    normal: Normal,
    form: str,
    vectors: str,
    limit: float,
    memory_format: Layout,
) -> None:
    x1, x2, a, scale, offset = make(normal, "many-blocks", layout=memory_format)
    given = (
        scale if vectors in ("scale", "affine") else None,
        offset if vectors in ("offset", "affine") else None,
        normal(len(scale)).argsort(),
    )
    options: Any = {"clamp": 1.3, "clamp_form": form, "limit": limit}
    y1, y2, _ = ops.affine_coupling(x1, x2, a, *given, **options)
    got = ops.coupling_log_likelihood(x1, x2, a, *given, **options)
    expected = ops.log_likelihood_map(torch.cat((y1, y2), 1))
    assert relative_error(got, expected) <= tolerance(F64, len(scale))


def test_the_results_are_not_rounded_to_half_precision(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = make(normal, "many-blocks", (BF16, BF16), memory_format)
    got = ops.coupling_log_likelihood(*operands)
    expected = ops.coupling_log_likelihood(*(t.double() for t in operands))
    assert got.dtype is F32
    assert got.is_contiguous()
    assert relative_error(got, expected) <= tolerance(F32, 17)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_non_finite_values_affect_only_their_position(
    each_backend: str, normal: Normal, value: float, where: int, memory_format: Layout
) -> None:
    operands = [memory_format(normal(2, c, 3, 4)) for c in (3, 2, 4)]
    operands[where][1, 1, 2, 3] = value
    got = ops.coupling_log_likelihood(*operands)
    expected = got.new_tensor(-math.inf if value > 0 else math.nan)
    torch.testing.assert_close(got[1, 2, 3], expected, equal_nan=True)
    assert bool(got[0].isfinite().all()) and int(got.isfinite().sum()) == got.numel() - 1


def test_first_and_second_derivatives_equal_finite_differences(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = [memory_format(normal(2, c, 2, 2, dtype=F64)).requires_grad_() for c in (2, 1, 2)]
    assert torch.autograd.gradcheck(ops.coupling_log_likelihood, tuple(operands))
    assert torch.autograd.gradgradcheck(ops.coupling_log_likelihood, tuple(operands))


def test_more_channels_than_shared_memory_holds_are_right(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = [memory_format(normal(2, c, 1, 2, dtype=F64)) for c in (2000, 1500, 3000)]
    got = ops.coupling_log_likelihood(*operands)
    with ops.backend("reference"):
        expected = ops.coupling_log_likelihood(*operands)
    assert relative_error(got, expected) <= tolerance(F64, 6000)


def test_it_refuses_what_the_coupling_refuses(each_backend: str) -> None:
    x1, x2, a = torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"a must have shape \(N, 2 \* C2, \*\) for x2"):
        ops.coupling_log_likelihood(x1, x2, a[:, :2])
    with pytest.raises(TypeError, match=r"perm must be torch\.int64"):
        ops.coupling_log_likelihood(x1, x2, a, perm=torch.zeros(5))
    with pytest.raises(ValueError, match="must have at least one channel together for a likeli"):
        ops.coupling_log_likelihood(x1[:, :0], x2[:, :0], a[:, :0])
