"""Gaussians at the positions of maps, estimated in one pass; behind a flow, they take up what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

#: Added to the variance of every latent channel, which is near 1: fewer images need more.
RIDGE = 0.4

#: Sums a tensor of this process over all that fit together; see :func:`alone`.
Total = Callable[[Tensor], Tensor]


def alone(part: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return part


class Moments:
    """Mean and covariance at every position of maps ``(N, C, H, W)``, summed in float64.

    Args:
        like: maps near which the mean is: little cancels then. They are not counted.
        total: of several processes that count different maps, sums over all.
    """

    def __init__(self, like: Tensor, total: Total = alone) -> None:
        self.count = 0
        self._sum = total
        near, images = positions(like).double().sum(2, keepdim=True), torch.tensor(len(like))
        self._origin = total(near) / total(images).to(near)
        self._total = torch.zeros_like(self._origin)
        self._outer = self._total.new_zeros(*self._total.shape[:2], self._total.shape[1])

    def add(self, maps: Tensor) -> None:
        """Count further maps."""
        deviation = positions(maps).double() - self._origin
        self._total += deviation.sum(2, keepdim=True)
        self._outer.baddbmm_(deviation, deviation.mT)
        self.count += maps.shape[0]

    def join(self) -> None:
        """Count what all processes have counted."""
        self.count = int(self._sum(torch.tensor(self.count)))
        self._total, self._outer = self._sum(self._total), self._sum(self._outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """``(H * W, C, 1)`` and ``(H * W, C, C)`` of the two or more maps counted; nothing can be added after."""
        offset = self._total / self.count
        covariance = self._outer.baddbmm_(offset, offset.mT, alpha=-self.count)
        return self._origin + offset, covariance.div_(self.count - 1)


class PositionBase(nn.Module):
    r"""A Gaussian at every position instead of one standard normal distribution for all.

    A flow shares its weights over positions, and its latent maps of a part that always lies alike keep some mean and
    covariance of their own at each. With those of the training images, once the flow is trained,

    .. math:: z'_p = \sqrt{1 + r}\, L_p^{-1} (z_p - \mu_p), \qquad L_p L_p^T = \Sigma_p + r I, \quad r = 0.4.

    Memory: :math:`H W (C^2 + C)` numbers a scale, and twice as many bytes each while fitting: 4 MB for
    efficientnet_lite0 at 192 pixels, 3.2 GB for wide_resnet50_2 at 512.

    Args:
        channels: of each scale.
        sizes: ``(height, width)`` of each scale.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for i, (c, (h, w)) in enumerate(zip(channels, sizes, strict=True)):
            self.register_buffer(f"mean{i}", torch.zeros(h * w, c, 1))
            self.register_buffer(f"whiten{i}", torch.eye(c).repeat(h * w, 1, 1))

    @torch.no_grad()
    def fit(self, latents: Iterable[Sequence[Tensor]], total: Total = alone) -> None:
        """Estimate the Gaussians from the latent maps ``[(N, C_i, H_i, W_i)]`` of batches of normal images.

        ``total`` sums over processes, each of which has batches of its own.

        Raises:
            ValueError: fewer than two images.
        """
        moments: list[Moments] = []
        for z in latents:
            moments = moments or [Moments(t, total) for t in z]
            for each, t in zip(moments, z, strict=True):
                each.add(t)
        for each in moments:
            each.join()
        if not moments or moments[0].count < 2:
            raise ValueError("PositionBase.fit: latents must hold at least two images")
        for i, each in enumerate(moments):
            mean, covariance = each.mean_and_covariance()
            covariance.diagonal(dim1=1, dim2=2).add_(RIDGE)
            factor = torch.linalg.cholesky(covariance.div_(1 + RIDGE))
            identity = torch.eye(factor.size(1), dtype=factor.dtype, device=factor.device)
            whiten = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            getattr(self, f"mean{i}").copy_(mean)
            getattr(self, f"whiten{i}").copy_(whiten)

    def forward(self, z: Sequence[Tensor]) -> list[Tensor]:
        """Latent maps ``[(N, C_i, H_i, W_i)]`` by the Gaussians of their positions, in the module's dtype."""
        return [
            _maps(getattr(self, f"whiten{i}") @ (positions(t) - getattr(self, f"mean{i}")), t)
            for i, t in enumerate(z)
        ]


def positions(maps: Tensor) -> Tensor:
    """``(N, C, H, W)`` as ``(H * W, C, N)``."""
    return maps.flatten(2).permute(2, 1, 0)


def _maps(x: Tensor, like: Tensor) -> Tensor:
    return x.permute(2, 1, 0).reshape(like.shape)
