"""How many scores stand above each threshold, counted without sorting the scores."""

from __future__ import annotations

import numpy as np
import torch

from msflow_ext.ops import _backend

_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def ranking(
    thresholds: np.ndarray, scores: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count the scores above each threshold, and those that reach it.

    The kernel looks every score up among the thresholds, in parallel: scores stay in place, and the
    counts are the same for any number of threads. It takes at most 4 bytes per score and about 50
    per threshold, results included.

    Args:
        thresholds: ``(D,)``, strictly falling, infinities included.
        scores: any shape, the thresholds' dtype, without NaN. The kernel knows float32 and float64;
            other floating dtypes take the reference.
        ignored: of the scores' shape, bool: scores that do not count.

    Returns:
        Two arrays ``(D,)`` int64: how many scores are ``> thresholds`` and ``>= thresholds``.

    Raises:
        ValueError: shapes differ, thresholds do not fall, 2**31 or more scores. TypeError: dtypes.
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
    """:func:`ranking` in plain NumPy, by a sort."""
    ranked = np.sort(scores[~ignored])
    above = ranked.size - np.searchsorted(ranked, thresholds, side="right")
    reached = ranked.size - np.searchsorted(ranked, thresholds, side="left")
    return above, reached


def _check(thresholds: np.ndarray, scores: np.ndarray, ignored: np.ndarray) -> None:
    if scores.dtype.kind != "f" or thresholds.dtype != scores.dtype or ignored.dtype != np.bool_:
        raise TypeError(
            "ranking: thresholds and scores must have one floating dtype and ignored be bool, got "
            f"{thresholds.dtype}, {scores.dtype} and {ignored.dtype}"
        )
    if thresholds.ndim != 1 or scores.shape != ignored.shape:
        raise ValueError(
            "ranking: thresholds must be (D,), scores and ignored have one shape, got "
            f"{thresholds.shape}, {scores.shape} and {ignored.shape}"
        )
    if max(thresholds.size, scores.size) >= 2**31:
        raise ValueError(f"ranking: fewer than 2**31 scores are counted, got {scores.size}")
    if not (thresholds[1:] < thresholds[:-1]).all():
        raise ValueError("ranking: thresholds must fall strictly")
