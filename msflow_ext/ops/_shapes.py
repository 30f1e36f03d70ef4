"""Dtypes and shapes that all ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which ops sum: float64 for float64, otherwise float32.

    Examples:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype is torch.float64 else torch.float32


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return a view of ``vector (C,)`` that broadcasts over ``like (N, C, *)``."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def positions(x: Tensor) -> int:
    """Return the number of positions of each channel of ``x (N, C, *)``."""
    return math.prod(x.shape[2:])
