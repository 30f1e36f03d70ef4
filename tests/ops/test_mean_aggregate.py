"""Properties of FastFlow's map: the kernel equals the reference, which equals the map of other packages."""

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

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])

# Sizes of the maps, size of the result.
SHAPES: dict[str, tuple[list[tuple[int, int]], tuple[int, int]]] = {
    "paper": ([(16, 16), (8, 8), (4, 4)], (64, 64)),
    "one-scale": ([(7, 5)], (21, 33)),
    "not-square": ([(13, 9), (7, 5)], (26, 40)),
    "smaller-than-the-maps": ([(16, 16), (8, 8)], (5, 6)),
    "one-row": ([(4, 4), (2, 2)], (1, 9)),
    "one-pixel-result": ([(4, 4), (2, 2)], (1, 1)),
    "one-pixel-maps": ([(1, 1), (4, 4)], (8, 8)),
    "same-size": ([(6, 6), (6, 6)], (6, 6)),
    "many-tasks": ([(32, 32), (16, 16)], (160, 160)),
}


def likelihoods(
    normal: Normal, sizes: list[tuple[int, int]], dtype: torch.dtype = F32
) -> list[Tensor]:
    return [-normal(3, *size, dtype=dtype).square() for size in sizes]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(
    native: None, normal: Normal, shape: str, dtype: torch.dtype
) -> None:
    sizes, size = SHAPES[shape]
    maps = likelihoods(normal, sizes, dtype)
    maps[0] = maps[0].mT.contiguous().mT  # a map need not be dense
    got = ops.mean_aggregate(maps, size)
    with ops.backend("reference"):
        expected = ops.mean_aggregate([m.double() for m in maps], size)
    for result, want in ((got.score, expected.score), (got.anomaly_map, expected.anomaly_map)):
        assert result.dtype is dtype
        assert relative_error(result, want) <= tolerance(dtype, 4 * len(sizes))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_is_minus_the_mean_of_the_likelihoods_of_all_scales(
    each_backend: str, normal: Normal, shape: str
) -> None:
    sizes, size = SHAPES[shape]
    maps = likelihoods(normal, sizes, F64)
    up = [
        F.interpolate(-m.exp()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        for m in maps
    ]
    expected = torch.stack(up).mean(0)
    got = ops.mean_aggregate(maps, size)
    assert relative_error(got.anomaly_map, expected) <= tolerance(F64, 4 * len(sizes))
    assert torch.equal(got.score, got.anomaly_map.amax((1, 2)))


def test_pixels_keep_their_outer_edges_in_place(each_backend: str) -> None:
    """Without aligned corners, a ramp over two pixels is flat for half a pixel at both ends."""
    ramp = torch.tensor([[[0.25, 0.75]]], dtype=F64).log()
    got = ops.mean_aggregate([ramp], (1, 8)).anomaly_map
    steps = [0.25, 0.25, 0.3125, 0.4375, 0.5625, 0.6875, 0.75, 0.75]
    torch.testing.assert_close(got, -torch.tensor([[steps]], dtype=F64))


@DTYPES
def test_likely_pixels_score_minus_one_and_unlikely_ones_zero(
    each_backend: str, dtype: torch.dtype
) -> None:
    maps = torch.stack([torch.zeros(4, 4), torch.full((4, 4), -1e6)]).to(dtype)
    got = ops.mean_aggregate([maps, maps[:, :2, :2]], 9)
    assert got.score.tolist() == pytest.approx([-1.0, 0.0], abs=tolerance(dtype))
    assert got.anomaly_map.amin((1, 2)).tolist() == pytest.approx([-1.0, 0.0], abs=tolerance(dtype))


def test_results_do_not_depend_on_the_batch_or_on_threads_bit_for_bit(
    native: None, normal: Normal
) -> None:
    sizes, size = SHAPES["many-tasks"]
    maps = likelihoods(normal, sizes)
    whole = ops.mean_aggregate(maps, size)
    single = ops.mean_aggregate([m[1:2] for m in maps], size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        again = ops.mean_aggregate(maps, size)
    finally:
        torch.set_num_threads(before)
    for name in ("score", "anomaly_map"):
        assert torch.equal(getattr(whole, name)[1:2], getattr(single, name))
        assert torch.equal(getattr(whole, name), getattr(again, name))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3e38, 200.0], ids=str)
def test_kernels_equal_the_reference_on_non_finite_and_huge_likelihoods(
    native: None, normal: Normal, value: float
) -> None:
    maps = likelihoods(normal, [(4, 4), (2, 2)])
    maps[0][1, 1, 2] = value
    got = ops.mean_aggregate(maps, 9)
    with ops.backend("reference"):
        expected = ops.mean_aggregate(maps, 9)
    for name in ("score", "anomaly_map"):
        g, w = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_the_map_is_differentiable(each_backend: str, normal: Normal) -> None:
    maps = [m.requires_grad_() for m in likelihoods(normal, [(3, 3), (2, 2)], F64)]

    def results(*maps: Tensor) -> tuple[Tensor, ...]:
        got = ops.mean_aggregate(maps, (5, 4))
        return got.score, got.anomaly_map

    nondeterminism = (
        1e-12 if maps[0].is_cuda else 0.0
    )  # torch sums the gradient of upsampling in any order
    assert torch.autograd.gradcheck(results, maps, nondet_tol=nondeterminism)


def test_an_empty_batch_has_no_scores(each_backend: str) -> None:
    got = ops.mean_aggregate([torch.zeros(0, 3, 3)], (5, 4))
    assert got.score.shape == (0,)
    assert got.anomaly_map.shape == (0, 5, 4)


MAP = torch.zeros(2, 4, 4)
REFUSED: dict[str, tuple[list[Tensor], Any, type[Exception], str]] = {
    "no map": ([], 8, ValueError, "log_likelihood must hold at least one map, got none"),
    "no size": ([MAP], 0, ValueError, r"size must be at least 1 pixel, got \(0, 0\)"),
    "no height": ([MAP], (0, 3), ValueError, r"size must be at least 1 pixel, got \(0, 3\)"),
    "half": ([MAP.bfloat16()], 8, TypeError, "all float32 or all float64"),
    "mixed": ([MAP, MAP.double()], 8, TypeError, "all float32 or all float64"),
    "one image": (
        [MAP[0]],
        8,
        ValueError,
        r"maps of shape \(N, H, W\) with equal N, got \[\(4, 4\)\]",
    ),
    "two N": ([MAP, MAP[:1]], 8, ValueError, "with equal N"),
    "no position": ([MAP[:, :0]], 8, ValueError, r"non-empty maps .* got \[\(2, 0, 4\)\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(each_backend: str, case: str) -> None:
    maps, size, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ops.mean_aggregate(maps, size)
