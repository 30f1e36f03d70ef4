"""Properties of the ranking: counts equal a comparison with every score, for any range, ties and threads."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msflow_ext import ops
from msflow_ext.ops import _backend
from msflow_ext.ops.ranking import ranking, ranking_reference

FLOATS = (np.float32, np.float64)
BACKENDS = ("native", "reference")[_backend.C is None :]
numbers = st.one_of(st.floats(allow_nan=False, width=32), st.integers(-3, 3).map(float))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decreasing(scores: np.ndarray) -> np.ndarray:
    return np.unique(scores)[::-1]


def noise(size: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(dtype)


def cluster(size: int, dtype: type) -> np.ndarray:
    """Return scores close to 1, except for three, so that most thresholds fall into few buckets."""
    scores = 1 + noise(size, dtype) / 2**10
    scores[[0, size // 2, size - 1]] = -np.inf, 0, np.inf
    return scores


def ties(size: int, dtype: type) -> np.ndarray:
    scores = np.round(noise(size, dtype) * 2) / 2
    scores[::7] *= -1  # makes negative zeros
    return scores


def equal(size: int, dtype: type) -> np.ndarray:
    return np.full(size, -0.5, dtype)


def tiny(size: int, dtype: type) -> np.ndarray:
    """Return subnormal numbers on both sides of zero."""
    return (np.arange(size) - size // 2).astype(dtype) * np.finfo(dtype).smallest_subnormal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@given(
    thresholds=st.lists(numbers, max_size=12),
    scores=st.lists(st.tuples(numbers, st.booleans()), max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_counts_equal_a_comparison_with_every_score(backend, dtype, thresholds, scores):
    limits = decreasing(np.array(thresholds, dtype))
    values = np.array([s for s, _ in scores], dtype)
    ignored = np.array([i for _, i in scores], bool)
    with ops.backend(backend):
        above, reached = ranking(limits, values, ignored)
    assert above.dtype == reached.dtype == np.int64
    kept = values[~ignored]
    assert above.tolist() == [np.count_nonzero(kept > t) for t in limits]
    assert reached.tolist() == [np.count_nonzero(kept >= t) for t in limits]


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", [noise, cluster, ties, equal, tiny], ids=lambda d: d.__name__)
def test_the_kernel_equals_the_reference_on_a_million_scores(native, draw, dtype, share):
    scores = draw(1_000_000, dtype)
    marked = np.random.default_rng(1).random(scores.size) < share
    limits = decreasing(scores[marked])
    expected = ranking_reference(limits, scores, marked)
    for got, want in zip(ranking(limits, scores, marked), expected, strict=True):
        assert np.array_equal(got, want)


def test_counts_do_not_depend_on_the_number_of_threads(native, threads):
    scores = noise(300_000, np.float32)
    marked = np.arange(scores.size) % 50 == 0
    limits = decreasing(scores[marked])
    expected = ranking_reference(limits, scores, marked)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for got, want in zip(ranking(limits, scores, marked), expected, strict=True):
            assert np.array_equal(got, want)


def test_arrays_of_any_layout_are_read(each_backend):
    scores = noise(600, np.float32).reshape(10, 20, 3)[:, ::2].transpose(2, 0, 1)
    ignored = np.broadcast_to(np.arange(10) < 3, scores.shape)
    limits = decreasing(scores[ignored])
    above, reached = ranking(limits, scores, ignored)
    kept = scores[~ignored]
    assert np.array_equal(above, (kept > limits[:, None]).sum(1))
    assert np.array_equal(reached, (kept >= limits[:, None]).sum(1))


@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.longdouble], ids=str)
def test_other_floating_point_dtypes_are_supported(dtype):
    scores = np.array([3, 2, 2, 1], dtype)
    above, reached = ranking(scores[[0, 1, 3]], scores, np.array([False, False, False, True]))
    assert above.tolist() == [0, 1, 3]
    assert reached.tolist() == [1, 3, 3]


REFUSED = {
    "integers": (
        [1],
        [1],
        [False],
        TypeError,
        "same floating-point dtype, and ignored must be bool, got int64",
    ),
    "two dtypes": (
        np.ones(1, np.float32),
        [1.0],
        [False],
        TypeError,
        "got float32, float64 and bool",
    ),
    "mask of integers": ([1.0], [1.0], [0], TypeError, "got float64, float64 and int64"),
    "two shapes": (
        [1.0],
        [1.0, 2.0],
        [False],
        ValueError,
        "have the same shape, got (1,), (2,) and (1,)",
    ),
    "matrix of thresholds": (
        [[1.0]],
        [1.0],
        [False],
        ValueError,
        "thresholds must have shape (D,)",
    ),
    "rising": ([1.0, 2.0], [1.0], [False], ValueError, "thresholds must be strictly decreasing"),
    "equal": ([1.0, 1.0], [1.0], [False], ValueError, "thresholds must be strictly decreasing"),
    "nan": ([1.0, np.nan], [1.0], [False], ValueError, "thresholds must be strictly decreasing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case):
    thresholds, scores, ignored, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        ranking(np.array(thresholds), np.array(scores), np.array(ignored))


def test_more_scores_than_31_bits_count_are_refused():
    many = np.broadcast_to(np.float32(0), 2**31)
    with pytest.raises(
        ValueError, match=r"must hold fewer than 2\*\*31 numbers, got 1 and 2147483648"
    ):
        ranking(np.zeros(1, np.float32), many, np.broadcast_to(False, many.shape))
