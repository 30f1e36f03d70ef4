"""Summarize results and times: deviation, median and quantiles, ratio, and the baseline of a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

#: The first of these that was timed is the baseline of a row.
BASELINES = ("reference fp32", "reference", "eager fp32", "eager", "sklearn", "800 thresholds")


def difference(got: Any, expected: Any) -> float:
    """Return the largest deviation of tensors, numbers or nests of them, relative to each largest expected magnitude."""
    left, right = list(tensors_of(got)), list(tensors_of(expected))
    if [t.shape for t in left] != [t.shape for t in right]:
        return math.inf
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if b.numel():
            magnitude = b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)
            error = float((a - b).abs().max() / magnitude)
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def baseline(row: Mapping[str, Any]) -> str:
    """Return the provider that the others of a row are compared with.

    It is the first of ``BASELINES`` that was timed, else the first provider that was timed, else ``""``.
    """
    timed = [name for name, found in row["providers"].items() if "ms" in found]
    return next((name for name in BASELINES if name in timed), timed[0] if timed else "")


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the 20th and 80th percentile."""
    mid, low, high = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return float(mid), float(low), float(high)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return the speedup: the median over rounds of the ratio within a round."""
    pairs = [a / b for a, b in zip(slower, faster, strict=True)]
    return quantiles(pairs)[0]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors and numbers in nests of lists, tuples and dataclasses, as float64."""
    if isinstance(value, Tensor):
        yield value.detach().double()
    elif is_dataclass(value):
        yield from tensors_of([v for v in vars(value).values() if v is not None])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    else:
        yield torch.tensor(value, dtype=torch.float64)
