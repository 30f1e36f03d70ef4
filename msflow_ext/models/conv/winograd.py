"""Choice of Winograd's algorithm for a convolution, by its sizes and dtypes, as benchmarks measured."""

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
    """Return tile size and dtype of the factors, or None if the direct convolution is faster.

    * The kernels are for the CPU.
    * The transforms process each channel, the products each pair of channels. So the algorithm pays from 32 channels
      on. In bfloat16 it pays from 64 on, because the direct convolution takes half the time.
    * The product needs sixteen tiles to keep its registers busy; smaller maps have fewer.
    * Larger tiles need 25 or 36 instead of 16 weights per pair of channels, and up to four times the memory of the
      weight. They pay from 1024 positions on. Below that, loading the weights takes longer than
      multiplying on more than two cores.
    * Tiles of 4 are not accurate enough with bfloat16 factors. Tiles of 3 are, and are as fast as tiles of 4 in float32.
    * With matrix units (AMX), the direct convolution in bfloat16 is as fast, even if this algorithm uses them too.

    Args:
        positions: number of positions in the batch, ``N * H * W``.
        dtype: dtype of the input.
        weight: weight of the convolution.
        padding, stride, dilation, groups: as in ``conv2d``.
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
