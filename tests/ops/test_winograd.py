"""Properties of the Winograd convolution: it equals torch's, kernels equal the reference, errors have the stated size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from msflow_ext import ops
from msflow_ext.ops.winograd import factor_dtypes
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# (N, C_in, H, W), C_out, padding.
SHAPES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, int]]] = {
    "whole-tiles": ((1, 16, 8, 12), 32, (1, 1)),
    "cut-tiles": ((2, 17, 9, 11), 33, (1, 1)),
    "one-pixel": ((1, 3, 1, 1), 1, (1, 1)),
    "no-padding": ((2, 5, 7, 3), 48, (0, 0)),
    "wide-padding": ((1, 7, 2, 5), 40, (3, 2)),
    "many-blocks": ((3, 40, 42, 38), 64, (1, 1)),
}


@pytest.fixture(params=[2, 3, 4])
def tile(request: pytest.FixtureRequest) -> int:
    return request.param


def make(normal: Normal, shape: str, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Return input, kernel and bias of a convolution that preserves the magnitude."""
    size, c_out, _ = SHAPES[shape]
    x = normal(*size, dtype=dtype)
    weight = normal(c_out, size[1], 3, 3, dtype=F64) / (9 * size[1]) ** 0.5
    return x, weight, normal(c_out, dtype=F64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_it_equals_the_convolution_of_torch(
    normal: Normal, shape: str, tile: int, relu: bool
) -> None:
    x, weight, bias = make(normal, shape)
    padding = SHAPES[shape][2]
    got = ops.winograd_conv2d(
        x, ops.winograd_weight(weight, tile, F64), bias, padding=padding, relu=relu
    )
    expected = F.conv2d(x, weight, bias, padding=padding)
    assert relative_error(got, expected.relu() if relu else expected) <= 1e-13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_kernels_equal_the_reference(
    native: None, normal: Normal, shape: str, tile: int, dtype: torch.dtype, layout: Layout
) -> None:
    x, weight, bias = make(normal, shape, dtype)
    values, options = ops.winograd_weight(weight, tile), {"padding": SHAPES[shape][2], "relu": True}
    got = ops.winograd_conv2d(layout(x), values, bias.float(), **options)
    assert got.dtype is dtype and got.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), weight, bias, padding=SHAPES[shape][2]).relu()
    # The interpolation has six times the error of a direct sum: the tolerance of 36 products.
    assert relative_error(got, expected) <= tolerance(dtype, 36 * x.size(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [2, 3])
def test_factors_in_bfloat16_equal_the_reference_and_are_near_the_exact_result(
    native: None, normal: Normal, shape: str, tile: int
) -> None:
    if BF16 not in factor_dtypes():
        pytest.skip("this processor does not multiply bfloat16")
    x, weight, bias = make(normal, shape, BF16)
    arguments = (x, ops.winograd_weight(weight, tile, BF16), bias.float())
    got = ops.winograd_conv2d(*arguments, padding=SHAPES[shape][2])
    with ops.backend("reference"):
        expected = ops.winograd_conv2d(*arguments, padding=SHAPES[shape][2])
    # The sums have the same terms in another order, and one rounding.
    assert relative_error(got, expected) <= tolerance(BF16, (tile + 2) ** 2 * x.size(1))
    exact = F.conv2d(x.double(), weight, bias, padding=SHAPES[shape][2])
    assert relative_error(got, exact) <= 0.02


@pytest.mark.parametrize("adjoint", [False, True], ids=["itself", "adjoint"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sizes", [(33, 7), (64, 32), (1, 1)], ids=str)
def test_kernels_transform_weights_as_the_reference_does(
    native: None, normal: Normal, tile: int, sizes: tuple[int, int], order: Any, adjoint: bool
) -> None:
    weight = normal(*sizes, 3, 3, dtype=F32).to(memory_format=order)
    for dtype in (F32, BF16)[: 1 if tile == 4 else 2]:
        got = ops.winograd_weight(weight, tile, dtype, adjoint=adjoint)
        with ops.backend("reference"):
            expected = ops.winograd_weight(weight, tile, dtype, adjoint=adjoint)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if dtype is F32:
            assert relative_error(got, expected) <= tolerance(F32, 9)
        else:  # a value halfway between two may be rounded either way, and change the following ones
            assert float((got != expected).float().mean()) <= 0.01


def test_the_adjoint_equals_the_derivative_of_torch(normal: Normal, tile: int) -> None:
    weight, grad = normal(5, 4, 3, 3, dtype=F64), normal(2, 5, 7, 8, dtype=F64)
    values = ops.winograd_weight(weight, tile, F64, adjoint=True)
    got = ops.winograd_conv2d(grad, values, torch.zeros(4, dtype=F64))
    expected = conv2d_input((2, 4, 7, 8), weight, grad, padding=1)
    assert relative_error(got, expected) <= 1e-13


def gradient_inputs(normal: Normal, shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the input of a convolution and a gradient of its results."""
    size, c_out, (rows, columns) = SHAPES[shape]
    grad = normal(size[0], c_out, size[2] + 2 * rows - 2, size[3] + 2 * columns - 2, dtype=dtype)
    return normal(*size, dtype=dtype), grad


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_weight_equals_that_of_torch(normal: Normal, shape: str) -> None:
    x, grad = gradient_inputs(normal, shape, F64)
    _, c_out, padding = SHAPES[shape]
    got = ops.winograd_weight_grad(x, grad, padding=padding)
    expected = conv2d_weight(x, (c_out, x.size(1), 3, 3), grad, padding=padding)  # pyright: ignore[reportArgumentType]
    assert got.dtype is F64
    assert relative_error(got, expected) <= 1e-13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_kernels_compute_the_gradient_of_the_weight(
    native: None, normal: Normal, shape: str, dtype: torch.dtype, layout: Layout
) -> None:
    x, grad = gradient_inputs(normal, shape, dtype)
    padding = SHAPES[shape][2]
    got = ops.winograd_weight_grad(layout(x), layout(grad), padding=padding)
    expected = ops.winograd_weight_grad(x.double(), grad.double(), padding=padding)
    assert got.dtype is F32 and got.is_contiguous()
    # Factors and sums are float32, for bfloat16 too.
    assert relative_error(got, expected) <= tolerance(F32, 36 * grad[:, 0].numel())
    with ops.backend("reference"):
        reference = ops.winograd_weight_grad(x, grad, padding=padding)
    assert reference.dtype is F32
    assert relative_error(reference, expected) <= tolerance(F32, 36 * grad[:, 0].numel())


@pytest.mark.parametrize(
    ("size", "c_out"),
    [((2, 1056, 8, 12), 1100), ((9, 64, 64, 68), 96), ((5, 520, 40, 20), 300)],
    ids=["groups-of-channels", "blocks-of-tiles", "both"],
)
def test_the_gradient_of_the_weight_is_right_if_computed_in_parts(
    native: None, normal: Normal, size: tuple[int, int, int, int], c_out: int
) -> None:
    x, grad = normal(*size, dtype=F32), normal(size[0], c_out, *size[2:], dtype=F32)
    got = ops.winograd_weight_grad(x, grad)
    expected = conv2d_weight(x, (c_out, size[1], 3, 3), grad, padding=1)
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    assert float((got - expected).abs().amax() / expected.square().mean().sqrt()) <= 1e-3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.winograd_weight_grad(x, grad), got)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", [(0, 2, 5), (3, 0, 5), (3, 2, 0)], ids=str)
def test_the_gradient_of_an_empty_convolution_is_zero(
    each_backend: str, sizes: tuple[int, int, int]
) -> None:
    n, c_in, c_out = sizes
    got = ops.winograd_weight_grad(torch.ones(n, c_in, 4, 6), torch.ones(n, c_out, 4, 6))
    assert got.shape == (c_out, c_in, 3, 3) and not got.any()


def test_errors_have_the_stated_size(each_backend: str, normal: Normal) -> None:
    x = normal(1, 192, 24, 24).relu()
    weight, bias = normal(64, 192, 3, 3) * (2 / (9 * 192)) ** 0.5, torch.zeros(64)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    for tile, stated in ((2, 3.7e-7), (3, 6e-7), (4, 1.1e-6)):
        got = ops.winograd_conv2d(x, ops.winograd_weight(weight, tile), bias)
        error = float((got.double() - expected).norm() / expected.norm())
        assert error <= 1.3 * stated


@pytest.mark.parametrize(("tile", "stated"), [(2, 3.4e-3), (3, 4.8e-3)])
def test_rounding_errors_of_factors_compensate_each_other(
    each_backend: str, normal: Normal, tile: int, stated: float
) -> None:
    x = normal(1, 192, 24, 24).relu().bfloat16()
    weight, bias = normal(64, 192, 3, 3) * (2 / (9 * 192)) ** 0.5, torch.zeros(64)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    values = ops.winograd_weight(weight, tile, BF16)
    nearest = ops.winograd_weight(weight, tile, F64).unflatten(2, (-1, 2)).squeeze(-1).mT.bfloat16()
    errors = [
        float((ops.winograd_conv2d(x, v, bias).double() - expected).norm() / expected.norm())
        for v in (values, nearest.contiguous())
    ]
    assert errors[0] <= 1.1 * stated
    assert errors[0] < 0.97 * errors[1]


def test_results_do_not_depend_on_the_batch_bit_for_bit(
    native: None, normal: Normal, tile: int
) -> None:
    x, weight, bias = make(normal, "many-blocks", F32)
    values = ops.winograd_weight(weight, tile)
    whole = ops.winograd_conv2d(x, values, bias.float())
    for k in range(3):
        assert torch.equal(ops.winograd_conv2d(x[k : k + 1], values, bias.float())[0], whole[k])


def test_nan_spreads_only_to_its_tiles(native: None, normal: Normal, tile: int) -> None:
    x, weight, bias = make(normal, "whole-tiles", F32)
    values = ops.winograd_weight(weight, tile)
    expected = ops.winograd_conv2d(x, values, bias.float(), relu=True)
    x[0, 3, 7, 11] = torch.nan
    got = ops.winograd_conv2d(x, values, bias.float(), relu=True)
    assert got[..., -1, -1].isnan().all()
    assert torch.equal(got[..., :4, :8], expected[..., :4, :8])


def test_an_empty_batch_stays_empty(each_backend: str, tile: int) -> None:
    values = ops.winograd_weight(torch.zeros(5, 2, 3, 3), tile)
    assert ops.winograd_conv2d(X(0, 2, 4, 6), values, X(5)).shape == (0, 5, 4, 6)


def test_derivatives_equal_finite_differences(normal: Normal) -> None:
    x, weight, bias = make(normal, "one-pixel")
    x = normal(1, 3, 2, 3, dtype=F64)
    for tile in (2, 3, 4):
        inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
        assert torch.autograd.gradcheck(
            lambda x, w, b, tile=tile: ops.winograd_conv2d(x, ops.winograd_weight(w, tile, F64), b),
            inputs,
        )


X = torch.zeros
VALUES = ops.winograd_weight(X(5, 2, 3, 3), 4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "5x5": (
        lambda: ops.winograd_weight(X(5, 2, 5, 5), 2),
        ValueError,
        r"weight must have shape \(C_out, C_in, 3, 3\), got \(5, 2, 5, 5\)",
    ),
    "tile 5": (lambda: ops.winograd_weight(X(5, 2, 3, 3), 5), ValueError, "tile must be 2, 3 or 4"),
    "tile 4 of bfloat16": (
        lambda: ops.winograd_weight(X(5, 2, 3, 3), 4, BF16),
        ValueError,
        "tile must be 2 or 3 for bfloat16, got 4",
    ),
    "float16 factors": (
        lambda: ops.winograd_weight(X(5, 2, 3, 3), 2, torch.float16),
        TypeError,
        "dtype must be float32, float64 or bfloat16, got torch.float16",
    ),
    "too small": (
        lambda: ops.winograd_conv2d(X(1, 2, 2, 4), VALUES, X(5), padding=(0, 1)),
        ValueError,
        r"at least 3x3 with its padding, got \(1, 2, 2, 4\) and padding \(0, 1\)",
    ),
    "negative padding": (
        lambda: ops.winograd_conv2d(X(1, 2, 9, 9), VALUES, X(5), padding=(0, -1)),
        ValueError,
        r"padding \(0, -1\)",
    ),
    "plain weight": (
        lambda: ops.winograd_conv2d(X(1, 2, 4, 4), X(5, 2, 3, 3), X(5)),
        ValueError,
        r"winograd_weight's shape \(16, 25 or 36, 1, 2, 32, 1\) for 2 input and 5 output channels",
    ),
    "other channels": (
        lambda: ops.winograd_conv2d(X(1, 3, 4, 4), VALUES, X(5)),
        ValueError,
        "for 3 input and 5 output channels",
    ),
    "other dtype": (
        lambda: ops.winograd_conv2d(X(1, 2, 4, 4, dtype=F64), VALUES, X(5, dtype=F64)),
        TypeError,
        "got torch.float64 and torch.float32",
    ),
    "bias of half": (
        lambda: ops.winograd_conv2d(X(1, 2, 4, 4), VALUES, X(5, dtype=BF16)),
        TypeError,
        r"bias must be torch.float32 of shape \(C_out,\), got torch.bfloat16 \(5,\)",
    ),
    "no bias": (
        lambda: ops.winograd_conv2d(X(1, 2, 4, 4), VALUES, X(0)),
        TypeError,
        r"bias must be .* got torch.float32 \(0,\)",
    ),
    "gradient of other size": (
        lambda: ops.winograd_weight_grad(X(2, 2, 4, 6), X(2, 5, 4, 5)),
        ValueError,
        r"grad must have shape \(2, C_out, 4, 6\), got \(2, 5, 4, 5\)",
    ),
    "gradient of too small": (
        lambda: ops.winograd_weight_grad(X(1, 2, 2, 4), X(1, 5, 0, 4), padding=(0, 1)),
        ValueError,
        "x must have .* at least 3x3 with its padding",
    ),
    "gradient of other dtype": (
        lambda: ops.winograd_weight_grad(X(1, 2, 4, 6), X(1, 5, 4, 6, dtype=BF16)),
        TypeError,
        "x and grad must have the same floating-point dtype, got torch.float32 and torch.bfloat16",
    ),
    "gradient elsewhere": (
        lambda: ops.winograd_weight_grad(X(1, 2, 4, 6), X(1, 5, 4, 6, device="meta")),
        ValueError,
        "grad must be on cpu, got meta",
    ),
    "elsewhere": (
        lambda: ops.winograd_conv2d(X(1, 2, 4, 4), VALUES, X(5, device="meta")),
        ValueError,
        "bias must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
