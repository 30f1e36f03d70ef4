"""Sinusoidal encoding of the position in a map, the condition of MSFlow's parallel flows."""

from __future__ import annotations

import torch
from torch import Tensor


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    r"""Return sines and cosines of the column index, then of the row index.

    With :math:`d = \mathrm{channels} / 2` and :math:`\omega_k = 10^{-4k/d}` for even k, channels k and k + 1 hold
    :math:`\sin(w\,\omega_k)` and :math:`\cos(w\,\omega_k)` of column w. Channels d + k and d + k + 1 hold those of row h.

    Shape:
        output: ``(1, channels, height, width)``, float32.
    """
    d = channels // 2
    omega = torch.exp(
        torch.arange(0, d, 2, dtype=torch.float32) * -(torch.log(torch.tensor(1e4)) / d)
    )

    def waves(length: int) -> Tensor:
        angle = omega[:, None] * torch.arange(length, dtype=torch.float32)
        return torch.stack((torch.sin(angle), torch.cos(angle)), 1).flatten(0, 1)

    columns = waves(width)[:, None, :].expand(d, height, width)
    rows = waves(height)[:, :, None].expand(d, height, width)
    return torch.cat((columns, rows))[None]
