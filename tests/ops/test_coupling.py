"""Properties of the coupling: kernels equal the reference, the inverse inverts it, log_det is that of the Jacobian."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]
Operands = list[Any]  # tensors, and None for a missing vector

FORMS = ("0.2", "head", "atan")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Dtypes of the data and of the subnet's output.
DTYPES = {
    "float32": (F32, F32),
    "float64": (F64, F64),
    "bfloat16": (BF16, BF16),
    "bfloat16-subnet": (F32, BF16),
}

# (samples, conditioning, transformed, positions, split). On the CPU a chunk has 256 positions and 16 lanes. On CUDA a
# packet has 16 bytes.
SHAPES = {
    "even": (2, 4, 4, (4, 6), 4),
    "odd-channels": (2, 4, 3, (5, 3), 4),
    "one-pixel": (3, 5, 4, (1, 1), 2),
    "many-blocks": (2, 9, 8, (21, 19), 8),
    "tail-lanes": (1, 19, 18, (17, 1), 37),
    "whole-packets": (2, 16, 16, (8, 40), 8),
    "one-channel": (2, 1, 1, (3, 3), 1),
    "tiny": (1, 2, 3, (2, 1), 4),
    "empty-batch": (0, 4, 3, (2, 2), 4),
    "no-conditioning-channels": (2, 0, 6, (3, 5), 0),
    "no-transformed-channels": (2, 3, 0, (3, 5), 2),
    "no-positions": (2, 4, 3, (0, 5), 3),
    "vectors": (5, 4, 3, (), 4),
    "sequences": (2, 4, 3, (7,), 5),
    "volumes": (2, 3, 3, (2, 3, 4), 3),
}

# Which of scale, offset and perm are given.
VECTORS = {
    "bare": "",
    "scale": "scale",
    "offset": "offset",
    "perm": "perm",
    "affine": "scale offset",
    "all": "scale offset perm",
}


@pytest.fixture(params=DTYPES)
def dtypes(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    return DTYPES[request.param]


def make(
    normal: Normal,
    shape: str = "odd-channels",
    dtypes: tuple[torch.dtype, torch.dtype] = (F64, F64),
    layout: Layout = Tensor.contiguous,
    vectors: str = "scale offset perm",
) -> Operands:
    """Return x1, x2, a, and scale, offset and perm if ``vectors`` names them."""
    n, c1, c2, positions, _ = SHAPES[shape]
    x, a = dtypes
    accumulation = ops.accumulation_dtype(x)
    halves = [normal(n, c, *positions, dtype=x) for c in (c1, c2)]
    scale = normal(c1 + c2, dtype=accumulation).exp() if "scale" in vectors else None
    offset = normal(c1 + c2, dtype=accumulation) if "offset" in vectors else None
    perm = normal(c1 + c2).argsort() if "perm" in vectors else None
    subnet = 6 * normal(n, 2 * c2, *positions, dtype=a)
    return [*map(layout, (*halves, subnet)), scale, offset, perm]


def terms(shape: str) -> list[int]:
    """Return how many numbers are summed by y1, y2, log_det and the gradients of x1, x2, a, scale and offset."""
    n, c1, c2, positions, _ = SHAPES[shape]
    pixels = math.prod(positions)
    return [1, 1, pixels * (c1 + 2 * c2), 1, 1, 1, n * pixels, n * pixels]


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_in_every_shape_and_layout(
    equals_reference: Any, normal: Normal, shape: str, layout: Layout, dtypes: Any
) -> None:
    couple = partial(ops.affine_coupling, clamp=1.9, limit=1.5, split=SHAPES[shape][-1])
    equals_reference(couple, make(normal, shape, dtypes, layout), terms(shape), layout)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [math.inf, 2.0])
def test_kernels_equal_the_reference_with_every_option(
    equals_reference: Any,
    normal: Normal,
    form: str,
    vectors: str,
    limit: float,
    memory_format: Layout,
    dtypes: Any,
) -> None:
    split = {"bare": 0, "scale": 7, "offset": 3}.get(vectors)
    operands = make(normal, "odd-channels", dtypes, memory_format, VECTORS[vectors])
    present = [True] * 6 + [t is not None for t in operands[3:5]]
    couple = partial(ops.affine_coupling, clamp=1.3, clamp_form=form, limit=limit, split=split)
    sums = [n for n, there in zip(terms("odd-channels"), present, strict=True) if there]
    equals_reference(couple, operands, sums)


def test_kernels_equal_the_reference_on_halves_of_different_layouts(
    equals_reference: Any, normal: Normal, memory_format: Layout
) -> None:
    x1, *rest = make(normal, layout=memory_format)
    equals_reference(ops.affine_coupling, [x1.mT.contiguous().mT, *rest], terms("odd-channels"))


@pytest.mark.parametrize("expanded", [(0, 1), (2,), (3,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_kernels_equal_the_reference_on_expanded_operands_and_gradients(
    native: None, normal: Normal, expanded: tuple[int, ...]
) -> None:
    def spread(x: Tensor) -> Tensor:
        shape = x.shape
        for d in expanded:
            x = x.narrow(d, 0, 1)
        return x.contiguous().expand(shape)

    def run(operands: Operands) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in operands[:3]]
        y1, y2, log_det = ops.affine_coupling(*leaves)
        grads = torch.autograd.grad([y1, y2], leaves, [spread(y1), spread(y2)])
        return [y1, y2, log_det, *grads]

    operands = make(normal, layout=spread)
    with ops.backend("reference"):
        expected = run(operands)
    for got, want in zip(run(operands), expected, strict=True):
        assert relative_error(got, want) <= tolerance(F64, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_log_det_results_and_gradients_are_equal_bit_for_bit(
    each_backend: str, normal: Normal, shape: str, layout: Layout, dtypes: Any
) -> None:
    def run(log_det: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
        results = ops.affine_coupling(*leaves, limit=1.5, split=SHAPES[shape][-1], log_det=log_det)
        assert (results[2] is None) != log_det
        expected = [t for t in leaves if t.requires_grad]
        return [*results[:2], *torch.autograd.grad(results[:2], expected, results[:2])]

    operands = make(normal, shape, dtypes, layout)
    assert all(map(torch.equal, run(log_det=False), run(log_det=True)))


def test_without_log_det_no_kernel_computes_it(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = make(normal, layout=memory_format)
    if not _backend.runs_cuda(operands[0]) or operands[0].is_cuda:
        pytest.skip("only the emulator counts launches")
    count = ctypes.c_uint64.in_dll(ctypes.CDLL(_backend.C.__file__), "emulated_launches")
    before = count.value
    ops.affine_coupling(*operands)
    ops.affine_coupling(*operands, log_det=False)
    ops.coupling_log_likelihood(*operands)
    assert count.value - before == 2 + 1 + 1


@pytest.mark.parametrize("shape", [s for s in SHAPES if SHAPES[s][2] > 1])
def test_results_and_gradients_have_dtype_and_memory_format_of_their_operands(
    native: None, normal: Normal, shape: str, layout: Layout, dtypes: Any
) -> None:
    operands = make(normal, shape, dtypes, layout)
    leaves = [t.requires_grad_() for t in operands[:3]]
    y1, y2, log_det = ops.affine_coupling(*leaves, *operands[3:], split=SHAPES[shape][-1])
    grads = torch.autograd.grad([y1.sum() + y2.sum() + log_det.sum()], leaves)
    assert {y1.dtype, y2.dtype} == {dtypes[0]}
    assert log_det.dtype is (F64 if dtypes[0] is F64 else F32)
    assert [g.dtype for g in grads] == [dtypes[0], dtypes[0], dtypes[1]]
    for result in (y1, y2, *grads):
        if layout.__name__.endswith("channels_last"):
            result = result.movedim(1, -1)
        assert result.is_contiguous() or layout.__name__ == "transposed"


def test_bfloat16_results_are_rounded_once(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = make(normal, "many-blocks", (BF16, BF16), memory_format)
    got = ops.affine_coupling(*operands)[:2]
    with ops.backend("reference"):
        exact: Operands = [
            t.double() if t is not None and t.is_floating_point() else t for t in operands
        ]
        expected = ops.affine_coupling(*exact)[:2]
    for g, w in zip(got, expected, strict=True):
        half_a_step = 2.0**-8 * w.abs() + tolerance(F32) * w.abs().max()
        assert bool(((g.double() - w).abs() <= half_a_step).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_inverts_the_coupling(
    each_backend: str, normal: Normal, shape: str, form: str, layout: Layout
) -> None:
    x1, x2, a, *vectors = make(normal, shape, layout=layout)
    y1, y2, log_det = ops.affine_coupling(
        x1, x2, a, *vectors, clamp_form=form, split=SHAPES[shape][-1]
    )
    y1, y2 = layout(y1), layout(y2)
    back1 = ops.conditioning_half(y1, y2, x1.size(1), *vectors)
    back2, log_det_back = ops.affine_coupling_inverse(y1, y2, a, *vectors, clamp_form=form)
    for got, expected in ((back1, x1), (back2, x2), (log_det_back, -log_det)):
        assert relative_error(got, expected) <= tolerance(F64, 64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vectors", VECTORS)
def test_the_inverse_kernel_equals_the_reference(
    equals_reference: Any,
    normal: Normal,
    form: str,
    vectors: str,
    memory_format: Layout,
    dtypes: Any,
) -> None:
    y1, y2, a, *rest = make(normal, "odd-channels", dtypes, memory_format, VECTORS[vectors])
    present = [True] * 5 + [t is not None for t in rest[:2]]
    uncouple = partial(ops.affine_coupling_inverse, clamp_form=form)
    sums = [n for n, there in zip(terms("odd-channels")[1:], present, strict=True) if there]
    equals_reference(uncouple, [y1, y2, a, *rest], sums)


def test_the_conditioning_half_has_the_dtype_of_the_data(normal: Normal, dtypes: Any) -> None:
    x1, x2, a, *vectors = make(normal, dtypes=dtypes)
    y1, y2, _ = ops.affine_coupling(x1, x2, a, *vectors)
    back = ops.conditioning_half(y1, y2, x1.size(1), *vectors)
    assert back.dtype is x1.dtype
    assert relative_error(back, x1) <= 4 * tolerance(x1.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vectors", VECTORS)
def test_log_det_is_that_of_the_jacobian(
    each_backend: str, normal: Normal, form: str, vectors: str, memory_format: Layout
) -> None:
    x1, x2, _, scale, offset, perm = make(normal, "tiny", vectors=VECTORS[vectors])
    c1, c2, x = x1.size(1), x2.size(1), torch.cat((x1, x2), 1)
    weight = 4 * normal(2 * c2, c1, dtype=F64)

    def subnet(x1: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", weight, x1)

    def couple(x: Tensor) -> tuple[Tensor, Tensor]:
        x = memory_format(x)
        x1, x2 = x[:, :c1], x[:, c1:]
        y1, y2, log_det = ops.affine_coupling(
            x1, x2, subnet(x1), scale, offset, perm, clamp_form=form, split=4
        )
        return torch.cat((y1, y2), 1), log_det

    def uncouple(y: Tensor) -> tuple[Tensor, Tensor]:
        y = memory_format(y)
        y1, y2 = y[:, :4], y[:, 4:]
        x1 = ops.conditioning_half(y1, y2, c1, scale, offset, perm)
        x2, log_det = ops.affine_coupling_inverse(
            y1, y2, subnet(x1), scale, offset, perm, clamp_form=form
        )
        return torch.cat((x1, x2), 1), log_det

    for function, at in ((couple, x), (uncouple, couple(x)[0])):
        jacobian = torch.autograd.functional.jacobian(lambda x, f=function: f(x)[0], at)
        assert isinstance(jacobian, Tensor)
        expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
        assert relative_error(function(at)[1], expected[None]) <= 1e-10


@pytest.mark.parametrize("vectors", ["bare", "all"])
@pytest.mark.parametrize("limit", [math.inf, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives_equal_finite_differences(
    native: None, normal: Normal, form: str, limit: float, vectors: str, memory_format: Layout
) -> None:
    *operands, perm = make(normal, "tiny", layout=memory_format, vectors=VECTORS[vectors])
    inputs: Any = [None if t is None else t.requires_grad_() for t in operands]

    def couple(*t: Any, **options: Any) -> tuple[Tensor, ...]:
        options |= {"clamp_form": form, "limit": limit, "split": 1}
        return ops.affine_coupling(*t, perm=perm, **options)

    def without_log_det(*t: Any) -> tuple[Tensor, ...]:
        return couple(*t, log_det=False)[:2]

    def uncouple(*t: Any) -> tuple[Tensor, ...]:
        return ops.affine_coupling_inverse(*t, perm=perm, clamp_form=form)

    clipped = torch.cat(couple(*inputs)[:2], 1).abs() == limit
    assert bool(clipped.any()) == (limit < math.inf)
    for function in (couple, without_log_det, uncouple):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_derivatives_are_right_if_the_subnet_reads_the_conditioning_half(
    each_backend: str, normal: Normal
) -> None:
    x1, x2, _, *vectors = make(normal, "even")
    x1, x2 = x1[:1, :, :1, :2], x2[:1, :, :1, :2]
    weight = normal(8, 4, dtype=F64).requires_grad_()

    def subnet(x1: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", weight, x1)

    def couple(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return ops.affine_coupling(x1, x2, subnet(x1, weight), *vectors)

    def uncouple(y1: Tensor, y2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x1 = ops.conditioning_half(y1, y2, 4, *vectors)
        return x1, *ops.affine_coupling_inverse(y1, y2, subnet(x1, weight), *vectors)

    for function in (couple, uncouple):
        inputs = (x1.clone().requires_grad_(), x2.clone().requires_grad_(), weight)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
