"""Properties of the coupling's copy in half precision: it and its gradient equal those of a cast of ``y1``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# (samples, conditioning, transformed, positions, split).
SHAPES = {
    "odd-channels": (2, 4, 3, (5, 3), 4),
    "one-pixel": (3, 5, 4, (1, 1), 2),
    "many-blocks": (2, 9, 8, (21, 19), 8),
    "whole-packets": (2, 16, 16, (8, 40), 16),
    "empty-batch": (0, 4, 3, (2, 2), 4),
    "nothing-to-copy": (2, 4, 3, (3, 5), 0),
    "no-positions": (2, 4, 3, (0, 5), 3),
    "volumes": (2, 3, 3, (2, 3, 4), 3),
}


def make(
    normal: Normal, shape: str = "odd-channels", layout: Layout = Tensor.contiguous
) -> list[Tensor]:
    """Return x1, x2 and vectors in float32, and the subnet's output in bfloat16."""
    n, c1, c2, positions, _ = SHAPES[shape]
    x1, x2 = (layout(normal(n, c, *positions)) for c in (c1, c2))
    a = layout(6 * normal(n, 2 * c2, *positions, dtype=BF16))
    return [x1, x2, a, normal(c1 + c2).exp(), normal(c1 + c2), normal(c1 + c2).argsort()]


@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_equal_the_reference_in_every_shape_and_layout(
    equals_reference: Any, normal: Normal, shape: str, layout: Layout
) -> None:
    n, c1, c2, positions, split = SHAPES[shape]
    pixels = math.prod(positions)
    terms = [1, 1, pixels * (c1 + 2 * c2), 1, 1, 1, 1, n * pixels, n * pixels]
    couple = partial(ops.affine_coupling_with_copy, clamp=1.9, limit=1.5, split=split)
    equals_reference(couple, make(normal, shape, layout), terms, layout)


@pytest.mark.parametrize("shape", SHAPES)
def test_results_equal_the_coupling_and_a_cast_bit_for_bit(
    each_backend: str, normal: Normal, shape: str, layout: Layout
) -> None:
    operands, split = make(normal, shape, layout), SHAPES[shape][-1]
    expected = ops.affine_coupling(*operands, split=split)
    *results, copy = ops.affine_coupling_with_copy(*operands, split=split)
    assert all(map(torch.equal, results, expected))
    assert copy.dtype is BF16
    assert torch.equal(copy, expected[0].to(BF16))


def test_the_copy_has_the_memory_format_of_the_result(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    y1, _, _, copy = ops.affine_coupling_with_copy(*make(normal, layout=memory_format))
    assert copy.stride() == y1.stride()


def test_its_gradient_is_added_to_that_of_the_result(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    x1, x2, a, *rest = make(normal, "many-blocks", memory_format)
    leaves = [t.requires_grad_() for t in (x1, x2, a)]
    copied, cast = (
        ops.affine_coupling_with_copy(*leaves, *rest),
        ops.affine_coupling(*leaves, *rest),
    )
    upstream = [normal(*t.shape, dtype=t.dtype) for t in copied]
    got = torch.autograd.grad(copied, leaves, upstream)
    expected = torch.autograd.grad([*cast, cast[0].to(BF16)], leaves, upstream)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("only", [0, 3])
def test_the_result_or_the_copy_may_have_no_gradient(
    each_backend: str, normal: Normal, only: int
) -> None:
    x1, x2, a, *rest = make(normal)
    x1.requires_grad_()
    result = ops.affine_coupling_with_copy(x1, x2, a, *rest)[only]
    (got,) = torch.autograd.grad(result.sum(), x1)
    plain = ops.affine_coupling(x1, x2, a, *rest)[0]
    (expected,) = torch.autograd.grad(plain.sum(), x1)
    assert relative_error(got, expected) <= tolerance(F32)


def test_second_derivatives_go_through_the_copy(native: None, normal: Normal) -> None:
    def second(x1: Tensor, x2: Tensor, *rest: Tensor) -> Tensor:
        leaf = x1.detach().requires_grad_()
        copy = ops.affine_coupling_with_copy(leaf, x2, *rest)[3]
        (grad,) = torch.autograd.grad(copy.float().pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.sum(), leaf)[0]

    operands = make(normal)
    got = second(*operands)
    with ops.backend("reference"):
        expected = second(*operands)
    assert int(got.count_nonzero()) > 0
    assert relative_error(got, expected) <= tolerance(BF16, 4)


def test_the_copy_is_the_result_if_the_dtypes_are_equal(each_backend: str, normal: Normal) -> None:
    x1, x2, a, *rest = make(normal)
    y1, y2, log_det, copy = ops.affine_coupling_with_copy(x1, x2, a.float(), *rest)
    assert copy is y1 or copy.data_ptr() == y1.data_ptr()
    expected = ops.affine_coupling(x1, x2, a.float(), *rest)
    assert all(map(torch.equal, (y1, y2, log_det), expected))


def test_it_refuses_what_the_coupling_refuses(each_backend: str, normal: Normal) -> None:
    x1, x2, a, *_ = make(normal)
    with pytest.raises(ValueError, match=r"a must have shape \(N, 2 \* C2, \*\) for x2"):
        ops.affine_coupling_with_copy(x1, x2, a[:, :2])
    with pytest.raises(ValueError, match=r"split must be in 0\.\.7, got 8"):
        ops.affine_coupling_with_copy(x1, x2, a, split=8)
    with pytest.raises(TypeError, match=r"a must be torch\.float32"):
        ops.affine_coupling_with_copy(x1, x2, a.double())
