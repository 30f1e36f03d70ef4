"""Where a convolution is faster in Winograd's form: decided by sizes and element types, measured in benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from msflow_ext.hardware import has_amx
from msflow_ext.ops.winograd import factor_dtypes

#: Tile, and dtype of the factors.
Form = tuple[int, torch.dtype]


def winograd_form(
    positions: int,
    dtype: torch.dtype,
    weight: Tensor,
    padding: tuple[int, int] | str,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Form | None:
    """Tile and factors' dtype for so many positions in ``dtype``, None where the direct convolution is the faster one.

    * The kernels are for the CPU.
    * The transforms handle every channel, the products every pair of channels: they pay from 32 channels on, in
      bfloat16, whose direct convolution takes half the time, from 64.
    * Sixteen tiles keep the registers of the product busy; smaller maps do not have them.
    * Larger tiles want 25 or 36 instead of 16 weights per pair of channels. They pay where 1024 positions share them;
      below, they take longer to come from memory than to multiply on more than two cores, and four times the memory.
    * Tiles of 4 are not accurate enough for factors in bfloat16; tiles of 3 are, and as fast as tiles of 4 in float32.
    * Matrix units (AMX) multiply directly in bfloat16 as fast as in this form, measured with a product on them too.
    """
    c_out, c_in, *kernel = weight.shape
    factors = factor_dtypes()
    if weight.device.type != "cpu":
        return None
    if (dtype not in factors and dtype is not torch.bfloat16) or not factors:
        return None
    if (kernel, tuple(stride), tuple(dilation), groups) != ([3, 3], (1, 1), (1, 1), 1):
        return None
    half = dtype is torch.bfloat16 and torch.bfloat16 in factors
    if isinstance(padding, str) or min(c_in, c_out) < (64 if half else 32) or positions < 64:
        return None
    if half and has_amx():
        return None
    large, factor = (3, torch.bfloat16) if half else (4, torch.float32)
    return (large if positions >= 1024 else 2), factor
