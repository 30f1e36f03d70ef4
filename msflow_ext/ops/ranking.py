"""Counts the scores above each threshold without sorting the scores."""

from __future__ import annotations

import numpy as np
import torch

from msflow_ext.ops import _backend

_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def ranking(
    thresholds: np.ndarray, scores: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count the scores above each threshold, and the scores that reach it.

    The kernel looks up every score among the thresholds, in parallel. It does not move the scores, and the counts do
    not depend on the number of threads. It needs at most 4 bytes per score and about 50 per threshold, results
    included.

    Args:
        thresholds: ``(D,)``, strictly decreasing; infinities are allowed.
        scores: Array of any shape in the dtype of the thresholds, without NaN. The kernel supports float32 and float64;
            other floating-point dtypes use the reference.
        ignored: Bool array of the shape of ``scores``, True for scores that do not count.

    Returns:
        Two arrays ``(D,)`` int64: the number of scores ``> thresholds`` and ``>= thresholds``.

    Raises:
        ValueError: Shapes differ, thresholds do not decrease, or there are 2**31 scores or more.
        TypeError: A dtype does not fit.

    Examples:
        >>> above, reached = ranking(np.array([2.0, 1.0]), np.array([3.0, 2.0, 1.0]), np.zeros(3, bool))
        >>> above.tolist(), reached.tolist()
        ([1, 2], [2, 3])
    """
    _check(thresholds, scores, ignored)
    if scores.dtype not in _DTYPES or not _backend.is_native():
        return ranking_reference(thresholds, scores, ignored)
    thresholds, scores, ignored = map(np.ascontiguousarray, (thresholds, scores, ignored))
    above, reached = (np.empty(thresholds.size, np.int64) for _ in range(2))
    _backend.C.ranking_cpu(
        _backend.DTYPES[_DTYPES[scores.dtype]],
        *(scores.ctypes.data, ignored.ctypes.data, scores.size),
        *(thresholds.ctypes.data, thresholds.size),
        torch.get_num_threads(),
        *(above.ctypes.data, reached.ctypes.data),
    )
    return above, reached


def ranking_reference(
    thresholds: np.ndarray, scores: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute :func:`ranking` in plain NumPy, by sorting the scores."""
    ranked = np.sort(scores[~ignored])
    above = ranked.size - np.searchsorted(ranked, thresholds, side="right")
    reached = ranked.size - np.searchsorted(ranked, thresholds, side="left")
    return above, reached


def _check(thresholds: np.ndarray, scores: np.ndarray, ignored: np.ndarray) -> None:
    if scores.dtype.kind != "f" or thresholds.dtype != scores.dtype or ignored.dtype != np.bool_:
        raise TypeError(
            "thresholds and scores must have the same floating-point dtype, and ignored must be bool, got "
            f"{thresholds.dtype}, {scores.dtype} and {ignored.dtype}"
        )
    if thresholds.ndim != 1 or scores.shape != ignored.shape:
        raise ValueError(
            "thresholds must have shape (D,), and scores and ignored must have the same shape, got "
            f"{thresholds.shape}, {scores.shape} and {ignored.shape}"
        )
    if max(thresholds.size, scores.size) >= 2**31:
        raise ValueError(
            f"thresholds and scores must hold fewer than 2**31 numbers, got {thresholds.size} and {scores.size}"
        )
    if not (thresholds[1:] < thresholds[:-1]).all():
        raise ValueError("thresholds must be strictly decreasing")
