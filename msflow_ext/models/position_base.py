"""Gaussians at the positions of maps, estimated in one pass: before a flow, or behind it for what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How many numbers the covariances of a scale have at most: 128 MiB of float32.
LIMIT = 2**25

#: Added to the variance of every latent channel, which is near 1: fewer images need more.
RIDGE = 0.4

#: Sums a tensor of this process over all that fit together; see :func:`alone`.
Total = Callable[[Tensor], Tensor]


def alone(part: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return part


class Moments:
    """Mean at every position of maps ``(N, C, H, W)``, covariance about it in every cell, summed in float64.

    Args:
        like: maps near which the mean is: little cancels then. They are not counted.
        total: of several processes that count different maps, sums over all.
        side: of a cell, in positions; 1: each has a covariance of its own.

    Attributes:
        count: of images.
        positions: of each cell, ``(cells, 1, 1)``.
    """

    def __init__(self, like: Tensor, total: Total = alone, side: int = 1) -> None:
        self.count = 0
        self._sum, self._side = total, side
        near, images = like.double().sum(0), torch.tensor(len(like))
        self._origin = total(near) / total(images).to(near)
        self._total = torch.zeros_like(self._origin)
        parts = self._cells(self._total[None])
        self._outer = parts @ parts.mT
        self.positions = self._cells(torch.ones_like(self._total[None, :1])).sum(2, keepdim=True)

    def add(self, maps: Tensor) -> None:
        """Count further maps."""
        deviation = maps.double() - self._origin
        self._total += deviation.sum(0)
        parts = self._cells(deviation)
        self._outer.baddbmm_(parts, parts.mT)
        self.count += maps.shape[0]

    def join(self) -> None:
        """Count what all processes have counted."""
        self.count = int(self._sum(torch.tensor(self.count)))
        self._total, self._outer = self._sum(self._total), self._sum(self._outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """``(C, H, W)`` and ``(cells, C, C)`` of the two or more maps counted; nothing can be added after."""
        offset = self._total / self.count
        parts = self._cells(offset[None])
        covariance = self._outer.baddbmm_(parts, parts.mT, alpha=-self.count)
        return self._origin + offset, covariance.div_((self.count - 1) * self.positions)

    def _cells(self, maps: Tensor) -> Tensor:
        return cells(maps, self._side)


class Gaussians(nn.Module):
    r"""A Gaussian at every position of maps, by which they are whitened: :math:`x'_p = W_p (x_p - \mu_p)`.

    Every position has a mean and a covariance of its own; but where those of a scale took more than 128 MiB, the positions
    of a cell, a square as small as can be, share a covariance about their means. A subclass says which :math:`W_p` a
    covariance makes.

    Memory: :math:`C^2` numbers a cell, and twice as many bytes each while fitting: 4 MB for efficientnet_lite0 at 192
    pixels, 0.3 GB for wide_resnet50_2 at 512, where cells are 3 x 3 or 4 x 4.

    Args:
        channels: of each scale.
        sizes: ``(height, width)`` of each scale.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = [(c, *size) for c, size in zip(channels, sizes, strict=True)]
        self.sides = [_side(*scale) for scale in self.scales]
        for i, (scale, side) in enumerate(zip(self.scales, self.sides, strict=True)):
            mean = torch.zeros(scale)
            self.register_buffer(f"mean{i}", mean)
            count = len(cells(mean[None], side))
            self.register_buffer(f"whiten{i}", torch.eye(len(mean)).repeat(count, 1, 1))

    def reset(self) -> None:
        """Change nothing until the next :meth:`fit`."""
        for i in range(len(self.scales)):
            self.get_buffer(f"mean{i}").zero_()
            self.get_buffer(f"whiten{i}").zero_().diagonal(dim1=1, dim2=2).fill_(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]], total: Total = alone) -> None:
        """Estimate the Gaussians from the maps ``[(N, C_i, H_i, W_i)]`` of batches of normal images.

        ``total`` sums over processes, each of which has batches of its own.

        Raises:
            ValueError: fewer than two images.
        """
        moments: list[Moments] = []
        for maps in batches:
            moments = moments or [
                Moments(x, total, side) for x, side in zip(maps, self.sides, strict=True)
            ]
            for each, x in zip(moments, maps, strict=True):
                each.add(x)
        for each in moments:
            each.join()
        if not moments or moments[0].count < 2:
            raise ValueError(f"{type(self).__name__}.fit: batches must hold at least two images")
        for i, each in enumerate(moments):
            mean, covariance = each.mean_and_covariance()
            self.get_buffer(f"mean{i}").copy_(mean)
            self.regularize(covariance, each)
            kept = self.get_buffer(f"whiten{i}")
            for whiten, part in zip(kept.split(64), covariance.split(64), strict=True):
                whiten.copy_(self.factor(part))  # in parts: it takes several times their memory

    def regularize(self, covariance: Tensor, moments: Moments) -> None:
        """Change covariances ``(cells, C, C)`` from these moments in place, such that they can be inverted."""
        raise NotImplementedError

    def factor(self, covariance: Tensor) -> Tensor:
        """The matrices that whiten what has these covariances ``(..., C, C)``."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[(N, C_i, H_i, W_i)]`` by the Gaussians of their positions, in the module's dtype.

        Raises:
            ValueError: maps of other sizes.
        """
        found = [tuple(x.shape[1:]) for x in maps]
        if found != self.scales:
            raise ValueError(f"maps must be {self.scales} (channels, height, width), got {found}")
        whitened = []
        for i, (x, side) in enumerate(zip(maps, self.sides, strict=True)):
            parts = cells(x - self.get_buffer(f"mean{i}"), side)
            whitened.append(_maps(self.get_buffer(f"whiten{i}") @ parts, side, x.shape))
        return whitened


class PositionBase(Gaussians):
    r"""A Gaussian at every position instead of one standard normal distribution for all.

    A flow shares its weights over positions, and its latent maps of a part that always lies alike keep some mean and
    covariance of their own at each. With those of the training images, once the flow is trained,

    .. math:: z'_p = \sqrt{1 + r}\, L_p^{-1} (z_p - \mu_p), \qquad L_p L_p^T = \Sigma_p + r I, \quad r = 0.4.
    """

    def regularize(self, covariance: Tensor, moments: Moments) -> None:
        covariance.diagonal(dim1=1, dim2=2).add_(RIDGE)
        covariance.div_(1 + RIDGE)

    def factor(self, covariance: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(covariance)
        identity = torch.eye(lower.size(1), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


class Whitening(Gaussians):
    r"""Features of which a Gaussian at every position has taken what it knows: the flow learns the rest.

    With :math:`\mu_p` and :math:`\Sigma_p` of standardised features of C channels, :math:`n_p` vectors (training images
    times positions of the cell) and, to make few of them steady, C further ones of the covariance
    :math:`\overline{\Sigma}` of all cells,

    .. math:: x'_p = \left(\frac{n_p \Sigma_p + C\, \overline{\Sigma}}{n_p + C} + 0.1\, I\right)^{-1/2} (x_p - \mu_p).

    The symmetric root leaves each channel as near to itself as can be: alike at all positions, which share the flow's
    weights.
    """

    def regularize(self, covariance: Tensor, moments: Moments) -> None:
        channels, weights = covariance.size(1), moments.positions
        usual = torch.einsum("kij,k->ij", covariance, weights[:, 0, 0]) / weights.sum()
        share = moments.count * weights / (moments.count * weights + channels)
        covariance.mul_(share).addcmul_(1 - share, usual)
        covariance.diagonal(dim1=1, dim2=2).add_(0.1)

    def factor(self, covariance: Tensor) -> Tensor:
        variances, axes = torch.linalg.eigh(covariance)
        return (axes * variances.rsqrt().unsqueeze(-2)) @ axes.mT


def cells(maps: Tensor, side: int = 1) -> Tensor:
    """``(N, C, H, W)`` as ``(cells, C, side * side * N)``: cells are squares of positions, with zeros beyond the border."""
    n, c, h, w = maps.shape
    rows, columns = -(-h // side), -(-w // side)
    maps = F.pad(maps, (0, columns * side - w, 0, rows * side - h))
    split = maps.reshape(n, c, rows, side, columns, side)
    return split.permute(2, 4, 1, 3, 5, 0).reshape(rows * columns, c, side * side * n)


def _side(channels: int, height: int, width: int) -> int:
    """Of the smallest cells that keep within the limit."""
    side = 1
    while (
        side < max(height, width) and -(-height // side) * -(-width // side) * channels**2 > LIMIT
    ):
        side += 1
    return side


def _maps(parts: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """What :func:`cells` makes of maps of this shape as maps again."""
    n, c, h, w = shape
    rows, columns = -(-h // side), -(-w // side)
    split = parts.reshape(rows, columns, c, side, side, n).permute(5, 2, 0, 3, 1, 4)
    return split.reshape(n, c, rows * side, columns * side)[..., :h, :w].contiguous()
