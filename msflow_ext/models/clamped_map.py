"""An anomaly map in which no scale outshouts the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext.models.position_base import Total, alone

#: A scale's share of the map stays below.
MOST = 8.0


class ClampedMap(nn.Module):
    r"""The sum over scales of how unusual a position is.

    .. math::
        A = \textstyle\sum_i U(f(z_i)), \quad z_i = \frac{-\log p_i - m_i}{s_i}, \quad
        f(z) = \frac{z}{\sqrt{1 + (\max(z, 0) / 8)^2}} < 8

    with the mean m and the standard deviation s of each scale's negative log-likelihood over the normal images, and U
    the bilinear upsampling (``align_corners=True``). What is more unusual keeps a larger value, however large both are.

    Args:
        scales: how many.
    """

    usual: Tensor

    def __init__(self, scales: int) -> None:
        super().__init__()
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
        scales = []
        for m, (mean, deviation) in zip(log_likelihood, self.usual, strict=True):
            z = (-m - mean) / deviation
            share = (z * (1 + (z.clamp_min(0) / MOST).square()).rsqrt())[:, None]
            scales.append(F.interpolate(share, (size, size), mode="bilinear", align_corners=True))
        return torch.cat(scales, 1).sum(1)
