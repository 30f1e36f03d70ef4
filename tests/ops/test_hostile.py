"""Properties of ops on arbitrary input: the result of the reference or a Python exception, and never a crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.ops.ranking import ranking, ranking_reference
from msflow_ext.testing import relative_error, tolerance

# Complex numbers and forward derivatives make lazily negated views, and zeros without memory.
negated: Any = torch._neg_view  # pyright: ignore[reportPrivateImportUsage]
without_memory: Any = torch._efficientzerotensor  # pyright: ignore[reportPrivateImportUsage]

EXAMPLES = int(os.environ.get("MSFLOW_EXAMPLES", "100"))
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, OverflowError)
SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 1e15, -1e15, 1e38, float("inf"), -float("inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WRONG = [torch.int64, torch.bool, torch.uint8, torch.complex64, *DTYPES]

# A function from N, channels of both halves, H and W to the shapes of an op's operands.
Shapes = Callable[[int, int, int, int, int], list[tuple[int, ...]]]


def outcome(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any] | None:
    """Return the results, or None if the arguments are refused."""
    try:
        found = function(*arguments)
    except REFUSALS:
        return None
    if isinstance(found, (ops.Aggregate, ops.MeanAggregate)):
        return [getattr(found, field.name) for field in fields(found)]
    return [*found] if isinstance(found, tuple) else [found]


def agree(got: Tensor, expected: Tensor) -> bool:
    """Return whether two results are equal except for rounding, and not finite in the same places."""
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return False
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    return relative_error(got[finite], expected[finite]) <= 6 * tolerance(expected.dtype)


def stored(x: Tensor, layout: str) -> Tensor:
    """Return the tensor with other strides, another offset or another alignment."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x
    if layout == "sliced":
        return torch.stack((x, x + 1), -1)[..., 0]
    if layout == "offset":
        return torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape)
    if layout == "unaligned" and x.numel():
        buffer = bytearray(x.numel() * x.element_size() + 1)
        place = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=1)
        return place.view(x.shape).copy_(x)
    if layout == "expanded" and x.dim() > 1 and x.size(-1):
        return x[..., :1].expand(x.shape)
    if layout == "negated" and x.is_floating_point():
        return negated(-x)
    if layout == "without-memory" and x.is_floating_point():
        return without_memory(tuple(x.shape), dtype=x.dtype)
    return x


LAYOUTS = ["contiguous", "transposed", "channels-last", "sliced", "offset", "unaligned", "expanded"]
LAYOUTS += ["negated", "without-memory"]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw normal numbers, sometimes with a few that are infinite, huge, tiny or NaN."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = torch.from_numpy(rng.standard_normal(shape))
    if x.numel():
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            x.view(-1)[int(rng.integers(x.numel()))] = value
    return stored(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def operands(draw: st.DrawFn, shapes: Shapes) -> list[Tensor]:
    """Draw operands of an op; one case in four has a wrong dtype or shape."""
    n, c1, c2 = (draw(st.integers(0, 4)) for _ in range(3))
    h, w = (draw(st.sampled_from([0, 1, 2, 3, 5, 8, 17])) for _ in range(2))
    dtype = draw(st.sampled_from(DTYPES))
    expected = shapes(n, c1, c2, h, w)
    accumulation = ops.accumulation_dtype(dtype)
    found = [draw(tensors(shape, accumulation if len(shape) == 1 else dtype)) for shape in expected]
    at = draw(st.integers(0, len(found) - 1))
    fault = draw(st.sampled_from(["", "", "", "", "", "dtype", "shape", "alias"]))
    if fault == "dtype":
        found[at] = found[at].to(draw(st.sampled_from(WRONG)))
    elif fault == "shape":
        shape = [*expected[at]]
        axis = draw(st.integers(0, len(shape)))
        if axis == len(shape) or draw(st.booleans()):
            shape = shape[:axis] + shape[axis + 1 :]
        else:
            shape[axis] += draw(st.sampled_from([1, 7]))
        found[at] = draw(tensors(tuple(shape), found[at].dtype))
    elif fault == "alias":
        found[at] = found[draw(st.integers(0, len(found) - 1))]
    return found


def couple(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, form: str) -> Any:
    perm = torch.arange(len(scale) - 1, -1, -1)
    return ops.affine_coupling(x1, x2, a, scale, offset, perm, clamp_form=form, limit=1e4)


def uncouple(x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor, offset: Tensor, form: str) -> Any:
    return ops.affine_coupling_inverse(x1, x2, a, scale, offset, clamp_form=form)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, tile: int) -> Tensor:
    factors = ops.winograd_weight(weight, tile, ops.accumulation_dtype(x.dtype))
    return ops.winograd_conv2d(x, factors, bias)


def halves(n: int, c1: int, c2: int, h: int, w: int) -> list[tuple[int, ...]]:
    return [(n, c1, h, w), (n, c2, h, w), (n, 2 * c2, h, w), (c1 + c2,), (c1 + c2,)]


# Function, shapes of its tensors, and values of its last argument.
OPS: dict[str, tuple[Callable[..., Any], Shapes, list[Any]]] = {
    "coupling": (couple, halves, ["0.2", "head", "atan", "none"]),
    "coupling-inverse": (uncouple, halves, ["0.2", "head", "atan", ""]),
    "norm": (
        lambda x, w, b, m, relu: ops.channel_norm(x, w, b, m, relu=relu),
        lambda n, c1, _, h, w: [(n, c1, h, w), (c1,), (c1,), (1, c1, h, w)],
        [True, False],
    ),
    "likelihoods": (
        lambda z, f: f(z),
        lambda n, c1, _, h, w: [(n, c1, h, w)],
        [ops.log_likelihood_map, ops.half_square_norm],
    ),
    "pool": (
        lambda x, y, size: ops.pool_and_concatenate([x, y], size),
        lambda n, c1, c2, h, w: [(n, c1, h, w), (n, c2, w, h)],
        [(1, 1), (2, 3), (5, 2), (0, 1), (-1, 2)],
    ),
    "upsample": (
        lambda x, low, _: ops.upsample_and_add(x, low),
        lambda n, c1, c2, h, w: [(n, c1, h, w), (n, c1, c2, c2 + 1)],
        [None],
    ),
    "aggregate": (
        lambda x, y, size: ops.aggregate([x, y], size),
        lambda n, c1, _, h, w: [(n, h, w), (n, c1, c1)],
        [1, 4, (3, 17), 0, (-1, 5)],
    ),
    "mean-aggregate": (
        lambda x, y, size: ops.mean_aggregate([x, y], size),
        lambda n, c1, _, h, w: [(n, h, w), (n, c1, c1)],
        [1, 4, (3, 17), 0, (-1, 5)],
    ),
    "winograd": (
        convolve,
        lambda n, c1, c2, h, w: [(n, c1, h, w), (c2, c1, 3, 3), (c2,)],
        [2, 4, 3],
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_the_result_of_the_reference_or_an_exception(native: None, name: str) -> None:
    function, shapes, options = OPS[name]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(operands(shapes), st.sampled_from(options))
    def check(found: list[Tensor], option: Any) -> None:
        before = [t.clone() for t in found]
        got = outcome(function, [*found, option])
        with ops.backend("reference"):
            expected = outcome(function, [*found, option])
        lazy = any(t._is_zerotensor() for t in found)  # for these torch computes 0 times NaN as 0
        assert lazy or (got is None) == (expected is None)
        for t, b in zip(found, before, strict=True):
            assert torch.equal(t.nan_to_num(), b.nan_to_num())
        if lazy or got is None or expected is None:
            return
        # The transforms of a tile mix huge or non-finite values with their neighbors; torch does not.
        mixing = name == "winograd" and not all((t.abs() < 1e9).all() for t in found)
        if not mixing:
            assert all(map(agree, got, expected))

    check()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 40),
    st.integers(0, 12),
    st.sampled_from([np.float32, np.float64, np.float16, np.int64, ">f4", np.longdouble]),
    st.sampled_from(["plain", "strided", "reversed", "unaligned", "read-only"]),
    st.lists(st.sampled_from(SPECIAL), max_size=3),
    st.integers(0, 99),
)
def test_ranking_gives_the_result_of_its_reference_or_an_exception(
    size, count, dtype, layout, values, seed
):
    if _backend.C is None:
        pytest.skip(f"kernels {_backend.STATUS}")
    rng = np.random.default_rng(seed)
    scores = rng.integers(-5, 5, size).astype(np.float64)
    scores[: len(values)] = values[:size]
    thresholds = np.unique(rng.integers(-6, 6, count).astype(np.float64))[::-1]
    if layout == "strided":
        scores = np.repeat(scores, 2)[::2]
    elif layout == "reversed":
        scores = scores[::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        scores, thresholds = scores.astype(dtype, order="K"), thresholds.astype(dtype)
    if layout == "unaligned":
        place = np.frombuffer(bytearray(scores.nbytes + 1), scores.dtype, scores.size, offset=1)
        place[:] = scores
        scores = place
    elif layout == "read-only":
        scores.flags.writeable = False
    arguments = (thresholds, scores, rng.random(size) < 0.2)
    got = outcome(ranking, arguments)
    if got is None:
        assert scores.dtype.kind != "f"
    elif not np.isnan(scores.astype(np.float64)).any():
        assert all(map(np.array_equal, got, ranking_reference(*arguments)))


INTEGERS = st.integers(-2, 7) | st.sampled_from([-(2**63), 2**62, 2**63 - 1, 2**63, 2**70])
X, MAPS = torch.arange(60.0).view(2, 3, 2, 5).cos(), torch.arange(-12.0, 0.0).view(2, 2, 3)


def permute(p: list[int]) -> Any:
    return ops.affine_coupling(X, X, X.repeat(1, 2, 1, 1), perm=torch.tensor(p, dtype=torch.int64))


# Functions of a list of integers.
TAKES_INTEGERS: dict[str, Callable[[list[int]], Any]] = {
    "perm": permute,
    "split": lambda p: ops.affine_coupling(X, X, X.repeat(1, 2, 1, 1), split=p[0]),
    "pool": lambda p: ops.pool_and_concatenate([X], (p[0], p[1])),
    "aggregate": lambda p: ops.aggregate([MAPS], (p[0], p[1]), top_k=p[2]),
    "mean-aggregate": lambda p: ops.mean_aggregate([MAPS], (p[0], p[1])),
    "winograd-padding": lambda p: ops.winograd_conv2d(
        X, ops.winograd_weight(torch.ones(4, 3, 3, 3), 2), torch.ones(4), padding=(p[0], p[1])
    ),
    "winograd-tile": lambda p: ops.winograd_weight(torch.ones(4, 3, 3, 3), p[0]),
}


@pytest.mark.parametrize("name", TAKES_INTEGERS)
def test_integers_give_the_result_of_the_reference_or_an_exception(native: None, name: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.lists(INTEGERS, min_size=6, max_size=6) | st.permutations(range(6)))
    def check(integers: list[int]) -> None:
        got = outcome(TAKES_INTEGERS[name], [integers])
        permutation = sorted(integers) == list(range(6))
        if name == "perm":
            assert (got is not None) == permutation  # the reference does not check it
        if got is None and not permutation:
            return
        with ops.backend("reference"):
            expected = outcome(TAKES_INTEGERS[name], [integers])
        assert (got is None) == (expected is None)
        assert all(map(agree, got or [], expected or []))

    check()


def test_the_backward_pass_supports_lazily_negated_and_memoryless_gradients(
    each_backend: str,
) -> None:
    x = torch.linspace(-1, 1, 24).view(1, 4, 2, 3).requires_grad_()
    y = ops.channel_norm(x, torch.ones(4), torch.zeros(4), relu=False)
    upstream = torch.arange(24.0).view(1, 4, 2, 3).cos()
    (expected,) = torch.autograd.grad(y, x, -upstream, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, negated(upstream), retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    (none,) = torch.autograd.grad(y, x, without_memory((1, 4, 2, 3)))
    assert none.count_nonzero() == 0


def test_a_coupling_without_channels_is_empty(native: None) -> None:
    x, vector = torch.zeros(2, 0), torch.zeros(0)
    y1, y2, log_det = ops.affine_coupling(
        x, x, x, vector, vector, torch.zeros(0, dtype=torch.int64)
    )
    assert y1.shape == y2.shape == (2, 0)
    assert log_det.tolist() == [0.0, 0.0]


def test_winograd_refuses_a_complex_weight() -> None:
    with pytest.raises(TypeError, match="weight must have a floating-point dtype, got"):
        ops.winograd_weight(torch.zeros(1, 1, 3, 3, dtype=torch.complex64), 2)
