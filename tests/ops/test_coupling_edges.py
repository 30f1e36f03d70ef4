"""Edge cases of the coupling: accuracy from denormal to huge values, non-finite values, and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.testing import relative_error, tolerance

Normal = Callable[..., Tensor]
Layout = Callable[[Tensor], Tensor]

FORMS = ("0.2", "head", "atan")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("clamp", [1.0, 1.9])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_log_scales_are_accurate_from_denormal_to_saturated_input(
    native: None, dtype: torch.dtype, form: str, clamp: float
) -> None:
    tiny = torch.finfo(dtype).tiny
    size = torch.logspace(math.log10(tiny) - 5, 4, 4001, dtype=F64).to(dtype)
    a_s = torch.cat((size, -size, torch.linspace(-50, 50, 4001, dtype=dtype)))
    a = torch.stack((a_s, torch.zeros_like(a_s)), 1)
    x2 = torch.ones(len(a_s), 1, dtype=dtype)
    _, y, s = ops.affine_coupling(x2[:, :0], x2, a, clamp=clamp, clamp_form=form)
    exact = a_s.double()
    expected = {
        "0.2": clamp * torch.tanh(0.1 * exact),
        "head": clamp * torch.tanh(0.1 * exact / clamp),
        "atan": 0.636 * clamp * torch.atan(exact / clamp),
    }[form]
    eps = torch.finfo(dtype).eps
    assert bool(((s - expected).abs() <= 4 * eps * expected.abs() + 2 * tiny * eps).all())
    assert bool(((y[:, 0] / expected.exp() - 1).abs() <= 8 * eps).all())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_scales_are_accurate_from_zero_to_infinity(native: None, dtype: torch.dtype) -> None:
    # A saturated tanh makes the log-scale exactly +-clamp.
    edges = {F32: (87.0, 88.7, 88.8, 103.0, 104.0, 200.0), F64: (708.0, 709.7, 709.8, 744.0, 800.0)}
    x2 = torch.ones(2, 1, dtype=dtype)
    a = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], dtype=dtype)
    finfo = torch.finfo(dtype)
    for clamp in (*torch.linspace(0.1, 86, 60, dtype=dtype).tolist(), *edges[dtype]):
        y = ops.affine_coupling(x2[:, :0], x2, a, clamp=clamp)[1][:, 0]
        s = torch.tensor([clamp, -clamp], dtype=dtype)
        expected = s.double().exp().to(dtype)
        same = torch.isclose(y, expected, rtol=2 * finfo.eps, atol=2 * finfo.tiny * finfo.eps)
        assert bool(same.all()), f"exp({s.tolist()}) gave {y.tolist()}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [math.inf, 1e6])
@pytest.mark.parametrize("where", ["x1", "x2", "a_s", "a_t"])
def test_kernels_equal_the_reference_on_nan_infinite_huge_and_denormal_input(
    native: None, normal: Normal, form: str, limit: float, where: str, memory_format: Layout
) -> None:
    finite = [0.0, -0.0, 1e-45, -1e-45, 1e4, -1e4]
    values = torch.tensor([*finite, 3e38, -3e38, math.inf, -math.inf, math.nan])
    x1, x2, a = (normal(len(values), c, 3, 6) for c in (1, 2, 4))
    {"x1": x1, "x2": x2, "a_s": a[:, :2], "a_t": a[:, 2:]}[where][:, 0, 1, 3] = values
    operands = [*map(memory_format, (x1, x2, a)), normal(3).exp(), normal(3)]
    upstream = [normal(11, 1, 3, 6), normal(11, 2, 3, 6), normal(11)]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in operands]
        results = ops.affine_coupling(*leaves, clamp_form=form, limit=limit)
        return list(results), list(torch.autograd.grad(results, leaves[:3], upstream))

    results, grads = run()
    with ops.backend("reference"):
        expected, expected_grads = run()
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for g, w in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g[: len(finite)], w[: len(finite)], rtol=1e-5, atol=1e-5)


X = torch.zeros
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one dimension": ({"x1": X(2)}, ValueError, r"x1 and x2 must have shapes \(N, C1, \*\) and"),
    "no dimension": ({"x2": X(())}, ValueError, r"x1 and x2 must have .* got \(2, 3, 4\) and \(\)"),
    "batches differ": ({"x1": X(1, 3, 4)}, ValueError, r"got \(1, 3, 4\) and \(2, 2, 4\)"),
    "positions differ": ({"x1": X(2, 3, 5)}, ValueError, r"with equal N and \*, got"),
    "ranks differ": ({"x1": X(2, 3)}, ValueError, r"with equal N and \*, got"),
    "subnet of another half": (
        {"a": X(2, 6, 4)},
        ValueError,
        r"a must have shape \(N, 2 \* C2, \*\)",
    ),
    "subnet of another size": ({"a": X(2, 4, 3)}, ValueError, r"got \(2, 4, 3\)"),
    "halves of two dtypes": ({"x1": X(2, 3, 4, dtype=F64)}, TypeError, "same floating-point dtype"),
    "integers": (
        {"x1": X(2, 3, 4, dtype=torch.int32), "x2": X(2, 2, 4, dtype=torch.int32)},
        TypeError,
        "same floating-point dtype, got torch.int32",
    ),
    "subnet in float64": (
        {"a": X(2, 4, 4, dtype=F64)},
        TypeError,
        "a must be torch.float32, or half",
    ),
    "another device": ({"a": X(2, 4, 4, device="meta")}, ValueError, "a must be on cpu, got meta"),
    "halves on two devices": ({"x1": X(2, 3, 4, device="meta")}, ValueError, "on the same device"),
    "short scale": (
        {"scale": X(4)},
        ValueError,
        r"scale must have shape \(5,\), one value per channel",
    ),
    "offset in bfloat16": ({"offset": X(5, dtype=BF16)}, TypeError, "offset must be torch.float32"),
    "perm in int32": ({"perm": X(5, dtype=torch.int32)}, TypeError, "perm must be torch.int64"),
    "scale elsewhere": ({"scale": X(5, device="meta")}, ValueError, "scale must be on cpu"),
    "clamp zero": ({"clamp": 0.0}, ValueError, "clamp must be positive and finite, got 0.0"),
    "clamp nan": ({"clamp": math.nan}, ValueError, "clamp must be positive and finite"),
    "clamp infinite": ({"clamp": math.inf}, ValueError, "clamp must be positive and finite"),
    "clamp form": ({"clamp_form": "tanh"}, ValueError, "clamp_form must be one of .* got 'tanh'"),
    "limit zero": ({"limit": 0.0}, ValueError, "limit must be positive, got 0.0"),
    "limit nan": ({"limit": math.nan}, ValueError, "limit must be positive"),
    "split too large": ({"split": 6}, ValueError, r"split must be in 0\.\.5, got 6"),
    "split negative": ({"split": -1}, ValueError, r"split must be in 0\.\.5, got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_coupling_refuses_arguments_that_do_not_fit(each_backend: str, case: str) -> None:
    bad, error, message = REFUSED[case]
    good: dict[str, Any] = {"x1": X(2, 3, 4), "x2": X(2, 2, 4), "a": X(2, 4, 4)}
    with pytest.raises(error, match=message):
        ops.affine_coupling(**(good | bad))


@pytest.mark.parametrize("case", [c for c in REFUSED if not c.startswith(("limit", "split"))])
def test_the_inverse_refuses_arguments_that_do_not_fit(each_backend: str, case: str) -> None:
    bad, error, message = REFUSED[case]
    good: dict[str, Any] = {"y1": X(2, 3, 4), "y2": X(2, 2, 4), "a": X(2, 4, 4)}
    bad = {name.replace("x", "y"): value for name, value in bad.items()}
    if case == "subnet of another half":
        bad["a"] = X(2, 12, 4)  # more transformed channels than channels
    with pytest.raises(error, match=message.replace("x1", "y1").replace("x2", "y2")):
        ops.affine_coupling_inverse(**(good | bad))


def test_the_inverse_refuses_an_odd_number_of_subnet_channels(each_backend: str) -> None:
    with pytest.raises(
        ValueError, match=r"with C2 <= 5 for y2 of shape \(2, 2, 4\), got \(2, 3, 4\)"
    ):
        ops.affine_coupling_inverse(X(2, 3, 4), X(2, 2, 4), X(2, 3, 4))


def test_the_conditioning_half_refuses_more_channels_than_the_results_have() -> None:
    with pytest.raises(ValueError, match=r"channels must be in 0\.\.5, got 6"):
        ops.conditioning_half(X(2, 3, 4), X(2, 2, 4), 6)
    with pytest.raises(ValueError, match=r"offset must have shape \(5,\)"):
        ops.conditioning_half(X(2, 3, 4), X(2, 2, 4), 3, offset=X(4))


def test_more_channels_than_shared_memory_holds_are_right(
    native: None, normal: Normal, memory_format: Layout
) -> None:
    operands = [memory_format(normal(2, c, 1, 2, dtype=F64)) for c in (2000, 1500, 3000)]
    perm = normal(3500).argsort()
    got = ops.affine_coupling(*operands, perm=perm)
    with ops.backend("reference"):
        expected = ops.affine_coupling(*operands, perm=perm)
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w) <= tolerance(F64, 6000)


@pytest.mark.parametrize("perm", [[0, 1, 2, 3, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, -1]], ids=str)
def test_kernels_refuse_a_perm_that_is_not_a_permutation(native: None, perm: list[int]) -> None:
    operands = (X(2, 3, 4), X(2, 2, 4), X(2, 4, 4), None, None, torch.tensor(perm))
    if _backend.runs_cuda(operands[0]):
        pytest.skip("no exception leaves a CUDA kernel")
    for function in (ops.affine_coupling, ops.affine_coupling_inverse):
        with pytest.raises(ValueError, match="perm must hold every channel once"):
            function(*operands)


@pytest.mark.parametrize("outside", [5, -1, 2**40])
def test_on_cuda_a_channel_whose_index_is_out_of_range_is_nan_and_all_others_are_right(
    native: None, normal: Normal, outside: int, memory_format: Layout
) -> None:
    x1, x2, a = (memory_format(normal(2, c, 3, 4)) for c in (3, 2, 4))
    if not _backend.runs_cuda(x1):
        pytest.skip("the CPU kernels refuse such a permutation")
    perm = torch.tensor([0, 4, 2, 3, 1], device=x1.device)
    expected = torch.cat(ops.affine_coupling(x1, x2, a, perm=perm)[:2], 1)
    perm[1] = outside
    got = torch.cat(ops.affine_coupling(x1, x2, a, perm=perm)[:2], 1)
    assert bool(got[:, 1].isnan().all())
    assert torch.equal(got[:, [0, 2, 3, 4]], expected[:, [0, 2, 3, 4]])


def test_second_derivatives_allow_results_that_do_not_depend_on_the_input(
    each_backend: str, normal: Normal
) -> None:
    x1, x2, a = (normal(2, c, 3, dtype=torch.float64) for c in (4, 4, 8))
    y1, y2, log_det = ops.affine_coupling(x1.requires_grad_(), x2, a, limit=1.5)
    total = y1.square().sum() + y2.sum() + log_det.sum()
    (grad,) = torch.autograd.grad(total, x1, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x1)
    assert torch.equal(second, 2.0 * (x1.abs() < 1.5))
