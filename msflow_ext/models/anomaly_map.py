"""An anomaly map in which no scale outshouts the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.models.gaussians import Total, alone

#: A scale's share of the map stays below.
MOST = 8.0


class ClampedMap(nn.Module):
    r"""The sum over scales of how unusual a position is.

    .. math::
        A = \textstyle\sum_i U(f(z_i)), \quad z_i = \frac{-\log p_i - m_i}{s_i}, \quad
        f(z) = \frac{z}{\sqrt{1 + (\max(z, 0) / 8)^2}} < 8

    with the mean m and the standard deviation s of each scale's negative log-likelihood over the normal images, and U
    the bilinear upsampling (``align_corners=True``), which a Gaussian filter may follow. What is more unusual keeps a larger value,
    however large both are.

    Args:
        scales: how many.
        smoothing: standard deviation of the Gaussian filter in pixels of the map; 0 for none.
    """

    usual: Tensor

    def __init__(self, scales: int, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("usual", torch.tensor([[0.0, 1.0]]).repeat(scales, 1))

    @torch.no_grad()
    def fit(self, likelihoods: Iterable[Sequence[Tensor]], total: Total = alone) -> None:
        """Measure what is usual from the log-likelihood maps ``[(N, H_i, W_i)]`` of batches of normal images.

        ``total`` sums over processes, each of which has batches of its own.
        """
        sums = torch.zeros(len(self.usual), 3, dtype=torch.float64)
        for maps in likelihoods:
            for i, m in enumerate(maps):
                wide = -m.double()
                sums[i] += torch.stack([wide.pow(k).sum() for k in range(3)]).cpu()
        sums = total(sums)
        mean = sums[:, 1] / sums[:, 0]
        variance = (sums[:, 2] / sums[:, 0] - mean.square()).clamp_min(1e-12)
        self.usual.copy_(torch.stack((mean, variance.sqrt()), 1))

    def forward(self, log_likelihood: Sequence[Tensor], size: int) -> Tensor:
        """The map ``(N, size, size)`` of log-likelihood maps ``[(N, H_i, W_i)]``."""
        lengths = sorted({n for m in log_likelihood for n in m.shape[1:]})
        spread = self._spread(lengths, size, log_likelihood[0])
        whole = log_likelihood[0].new_zeros(())
        for m, (mean, deviation) in zip(log_likelihood, self.usual, strict=True):
            z = (-m - mean) / deviation
            share = z * (1 + (z.clamp_min(0) / MOST).square()).rsqrt()
            rows, columns = (spread[n] for n in m.shape[1:])
            whole = whole + rows.T @ share @ columns
        return whole

    def _spread(self, lengths: Sequence[int], size: int, like: Tensor) -> dict[int, Tensor]:
        """For each length of an axis, ``(length, size)``: what each place of it adds to the pixels, smoothed.

        Upsampling and filter are products of what they do to rows and to columns.
        """
        on: Any = {"dtype": like.dtype, "device": like.device}
        distances = [
            torch.linspace(0, n - 1, size, **on) - torch.arange(n, **on)[:, None] for n in lengths
        ]
        found = (1 - torch.cat(distances).abs()).clamp_min(0)
        if self.smoothing:
            reach = math.ceil(4 * self.smoothing)
            offsets = torch.arange(-reach, reach + 1, **on)
            weights = torch.softmax(-(offsets / self.smoothing).square() / 2, 0)
            padded = F.pad(found[:, None], (reach, reach), mode="replicate")
            found = F.conv1d(padded, weights[None, None])[:, 0]
        return dict(zip(lengths, found.split(list(lengths)), strict=True))
