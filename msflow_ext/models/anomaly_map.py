"""An anomaly map of standardized scales, each softly limited so that none dominates the sum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.models.gaussians import Total, one_process

#: Upper limit of a scale's contribution to the map.
MOST = 8.0


class ClampedMap(nn.Module):
    r"""Sum of standardized negative log-likelihood maps, softly limited per scale.

    .. math::
        A = \textstyle\sum_i U(f(z_i)), \quad z_i = \frac{-\log p_i - m_i}{s_i}, \quad
        f(z) = \frac{z}{\sqrt{1 + (\max(z, 0) / 8)^2}} < 8

    with the mean m and the standard deviation s of each scale's negative log-likelihood over the normal images. U is
    bilinear upsampling (``align_corners=True``), which a Gaussian filter may follow. The limit f is strictly increasing,
    so it keeps the order of the values of a scale.

    Args:
        scales: number of scales.
        smoothing: standard deviation of the Gaussian filter in pixels of the map; 0 for none.
    """

    usual: Tensor

    def __init__(self, scales: int, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("usual", torch.tensor([[0.0, 1.0]]).repeat(scales, 1))

    @torch.no_grad()
    def fit(self, likelihoods: Iterable[Sequence[Tensor]], total: Total = one_process) -> None:
        """Estimate m and s from normal images.

        Args:
            likelihoods: log-likelihood maps ``[(N, H_i, W_i)]`` of each batch.
            total: sums a tensor over the processes, if each has a share of the batches.
        """
        sums = torch.zeros(len(self.usual), 3, dtype=torch.float64)
        for maps in likelihoods:
            for i, m in enumerate(maps):
                values = -m.double()
                sums[i] += torch.stack([values.pow(k).sum() for k in range(3)]).cpu()
        sums = total(sums)
        mean = sums[:, 1] / sums[:, 0]
        variance = (sums[:, 2] / sums[:, 0] - mean.square()).clamp_min(1e-12)
        self.usual.copy_(torch.stack((mean, variance.sqrt()), 1))

    def forward(self, log_likelihood: Sequence[Tensor], size: int) -> Tensor:
        """Return the anomaly map ``(N, size, size)`` of log-likelihood maps ``[(N, H_i, W_i)]``."""
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
        """Return for each axis length the matrix ``(length, size)`` that upsamples and smooths along that axis."""
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
