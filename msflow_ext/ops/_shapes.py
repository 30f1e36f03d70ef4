"""Dtypes and shapes that all ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """``vector (C,)`` so that it broadcasts over ``like (N, C, *)``."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def positions(x: Tensor) -> int:
    """How many positions a channel of ``x (N, C, *)`` has."""
    return math.prod(x.shape[2:])
