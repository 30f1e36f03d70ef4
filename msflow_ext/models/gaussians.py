"""Gaussians per position of feature maps, estimated in one pass, and whitening by them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Most numbers that the covariances of a scale may have: 256 MiB of float64.
LIMIT = 2**25

#: Sums a tensor over the processes that train together; :func:`one_process` for one process.
Total = Callable[[Tensor], Tensor]


def one_process(part: Tensor) -> Tensor:
    """Return ``part``: the sum over a single process."""
    return part


class Moments:
    """Mean per position and covariance per cell of maps ``(N, C, H, W)``, summed in float64.

    Args:
        like: maps whose mean is near that of the data, which avoids cancellation. They are not counted.
        total: sums a tensor over the processes, if each counts different maps.
        side: side of a cell in positions; 1 gives each position its own covariance.

    Attributes:
        count: number of images.
        positions: number of positions in each cell, ``(cells, 1, 1)``.
    """

    def __init__(self, like: Tensor, total: Total = one_process, side: int = 1) -> None:
        self.count = 0
        self._sum, self._side = total, side
        near, images = like.double().sum(0), torch.tensor(len(like))
        self._origin = total(near) / total(images).to(near)
        self._total = torch.zeros_like(self._origin)
        parts = self._cells(self._total[None])
        self._outer = parts @ parts.mT
        self.positions = self._cells(torch.ones_like(self._total[None, :1])).sum(2, keepdim=True)

    def add(self, maps: Tensor) -> None:
        """Add maps to the sums."""
        deviation = maps.double() - self._origin
        self._total += deviation.sum(0)
        parts = self._cells(deviation)
        self._outer.baddbmm_(parts, parts.mT)
        self.count += maps.shape[0]

    def fresh(self) -> Moments:
        """Return empty moments of the same positions, for a part that :meth:`without` subtracts."""
        found = copy.copy(self)
        found.count = 0
        found._total, found._outer = torch.zeros_like(self._total), torch.zeros_like(self._outer)
        return found

    def without(self, part: Moments) -> Moments:
        """Return these moments minus those of ``part``, whose memory is reused."""
        part.count = self.count - part.count
        part._total = self._total - part._total
        part._outer.neg_().add_(self._outer)
        return part

    def join(self) -> None:
        """Sum the moments over all processes."""
        self.count = int(self._sum(torch.tensor(self.count)))
        self._total, self._outer = self._sum(self._total), self._sum(self._outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return mean ``(C, H, W)`` and covariance ``(cells, C, C)`` of two or more maps; call it once, at the end."""
        offset = self._total / self.count
        parts = self._cells(offset[None])
        covariance = self._outer.baddbmm_(parts, parts.mT, alpha=-self.count)
        return self._origin + offset, covariance.div_((self.count - 1) * self.positions)

    def _cells(self, maps: Tensor) -> Tensor:
        return cells(maps, self._side)


class Whitening(nn.Module):
    r"""Whitening of features given the coarser scales, with one Gaussian per position.

    Standardized features :math:`x` of a scale are whitened given the features :math:`u` of all coarser scales at the same
    place (bilinear, ``align_corners=False``). Their linear prediction of :math:`x` is subtracted, then the residual is
    whitened:

    .. math:: x'_p = S_p^{-1/2} \left(x_p - \mu_p - B_p (u_p - \nu_p)\right), \qquad
        B_p = \Sigma_p^{xu} (\Sigma_p^{uu})^{-1}, \quad S_p = \Sigma_p^{xx} - B_p \Sigma_p^{ux},

    according to the joint Gaussian of all scales. :math:`\Sigma_p` is the covariance of K channels over :math:`n_p` vectors
    (images times positions of the cell). It is regularized by K further vectors, whose covariance is the mean over all
    cells plus :math:`0.1\, I`. The symmetric root changes each channel as little as possible. So a channel means the same
    at all positions, which share the flow's weights.

    Training images are whitened by the Gaussian of the others, see :meth:`msflow_ext.features.Features.standardize`.
    Whitened by their own Gaussian, they would be far shorter than any new image.

    Every position has its own mean and covariance. If the covariances of a scale would exceed 2^25 numbers, the positions
    of a cell share one. A cell is the smallest square of positions that keeps the limit.

    Memory: a scale's channels times K numbers per cell, and twice :math:`K^2` numbers of 8 bytes while fitting. With the
    pooled maps of MSFlow:

    | Backbone | Pixels | Positions in a cell | Memory | While fitting |
    | --- | --- | --- | --- | --- |
    | efficientnet_lite0 | 192 | 1 | 15 MB | 0.35 GB |
    | wide_resnet50_2 | 512 | 22 x 22, 11 x 11, 4 x 4 | 0.15 GB | 1.1 GB |

    Args:
        channels: channels of each scale.
        sizes: ``(height, width)`` of each scale.

    Attributes:
        one_by_one: whether each image is whitened separately, so that its result does not depend on the batch.
    """

    one_by_one = False

    def __init__(self, channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = [(c, *size) for c, size in zip(channels, sizes, strict=True)]
        self.sides = []
        for i, (c, *size) in enumerate(self.scales):
            mean = torch.zeros(self.width(i), *size)
            side = _side(*mean.shape)
            self.sides.append(side)
            self.register_buffer(f"mean{i}", mean)
            self.register_buffer(
                f"whiten{i}", mean.new_zeros(len(cells(mean[None], side)), c, len(mean))
            )
        self.reset()

    def reset(self) -> None:
        """Become the identity until the next :meth:`fit`."""
        for i in range(len(self.scales)):
            self.get_buffer(f"mean{i}").zero_()
            self.get_buffer(f"whiten{i}").zero_().diagonal(dim1=1, dim2=2).fill_(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]], total: Total = one_process) -> None:
        """Estimate the Gaussians from normal images.

        Args:
            batches: maps ``[(N, C_i, H_i, W_i)]`` of each batch.
            total: sums a tensor over the processes, if each has a share of the batches.

        Raises:
            ValueError: ``batches`` has fewer than two images.
        """
        self.take(self.count(batches, total))

    @torch.no_grad()
    def count(
        self,
        batches: Iterable[Sequence[Tensor]],
        total: Total = one_process,
        like: Sequence[Moments] = (),
    ) -> list[Moments]:
        """Return the moments of batches, per scale.

        Args:
            batches: maps ``[(N, C_i, H_i, W_i)]`` of each batch.
            total: sums a tensor over the processes, if each has a share of the batches.
            like: moments of all images, if these batches are a part of them.
        """
        moments = [each.fresh() for each in like]
        for maps in batches:
            joined = self.joined(maps)
            moments = moments or [
                Moments(x, total, side) for x, side in zip(joined, self.sides, strict=True)
            ]
            for each, x in zip(moments, joined, strict=True):
                each.add(x)
        for each in moments:
            each.join()
        return moments

    def take(self, moments: Sequence[Moments]) -> None:
        """Set the Gaussians from these moments, which cannot be used afterwards.

        Raises:
            ValueError: they have fewer than two images.
        """
        images = moments[0].count if moments else 0
        if images < 2:
            raise ValueError(f"batches must hold at least two images, got {images}")
        for i, each in enumerate(moments):
            mean, covariance = each.mean_and_covariance()
            self.get_buffer(f"mean{i}").copy_(mean)
            self.regularize(covariance, each)
            kept = self.get_buffer(f"whiten{i}")
            parts = zip(kept.split(64), covariance.split(64), strict=True)
            for whiten, part in parts:  # the decompositions need several times the memory of a part
                whiten.copy_(self.factor(part, whiten.size(1)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return whitened maps ``[(N, C_i, H_i, W_i)]`` in the module's dtype.

        Raises:
            ValueError: ``maps`` has other channels or sizes.
        """
        found = [tuple(x.shape[1:]) for x in maps]
        if found != self.scales:
            raise ValueError(f"maps must have (C, H, W) = {self.scales}, got {found}")
        if self.one_by_one and len(maps[0]) > 1:
            single = [self([x[n : n + 1] for x in maps]) for n in range(len(maps[0]))]
            return [torch.cat(scale) for scale in zip(*single, strict=True)]
        whitened = []
        for i, (y, side) in enumerate(zip(self.joined(maps), self.sides, strict=True)):
            parts = cells(y - self.get_buffer(f"mean{i}"), side)
            whitened.append(_maps(self.get_buffer(f"whiten{i}") @ parts, side, maps[i].shape))
        return whitened

    def width(self, scale: int) -> int:
        """Return the dimension of a Gaussian of this scale: its channels and those of all coarser scales."""
        return sum(c for c, *_ in self.scales[scale:])

    def joined(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the vectors of the Gaussians, ``[(N, width, H_i, W_i)]``, with the scale's own channels first."""
        return [
            torch.cat((x, *(resize(u, x.shape[2:]) for u in maps[i + 1 :])), 1)
            for i, x in enumerate(maps)
        ]

    def regularize(self, covariance: Tensor, moments: Moments) -> None:
        """Regularize the covariances ``(cells, K, K)`` of these moments in place, so that they can be inverted."""
        width, weights = covariance.size(1), moments.positions
        prior = torch.einsum("kij,k->ij", covariance, weights[:, 0, 0]) / weights.sum()
        prior.diagonal().add_(0.1)
        share = moments.count * weights / (moments.count * weights + width)
        covariance.mul_(share).addcmul_(1 - share, prior)

    def factor(self, covariance: Tensor, channels: int) -> Tensor:
        """Return matrices ``(..., channels, K)`` that whiten the first channels, given covariances ``(..., K, K)``."""
        own, coarser = covariance[..., :channels, :channels], covariance[..., channels:, channels:]
        across = covariance[..., channels:, :channels]
        slope = torch.cholesky_solve(across, torch.linalg.cholesky(coarser)).mT
        variances, axes = torch.linalg.eigh(own - slope @ across)
        root = (axes * variances.rsqrt().unsqueeze(-2)) @ axes.mT
        return torch.cat((root, -root @ slope), -1)


def resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize maps ``(N, C, H, W)`` to a grid ``(height, width)``."""
    return F.interpolate(x, size=list(grid), mode="bilinear", align_corners=False)


def cells(maps: Tensor, side: int = 1) -> Tensor:
    """Reshape ``(N, C, H, W)`` to ``(cells, C, side * side * N)``: squares of positions, zero-padded at the border."""
    n, c, h, w = maps.shape
    rows, columns = -(-h // side), -(-w // side)
    maps = F.pad(maps, (0, columns * side - w, 0, rows * side - h))
    split = maps.reshape(n, c, rows, side, columns, side)
    return split.permute(2, 4, 1, 3, 5, 0).reshape(rows * columns, c, side * side * n)


def _side(channels: int, height: int, width: int) -> int:
    """Return the side of the smallest cells whose covariances keep the limit."""
    side = 1
    while (
        side < max(height, width) and -(-height // side) * -(-width // side) * channels**2 > LIMIT
    ):
        side += 1
    return side


def _maps(parts: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """Invert :func:`cells` for maps of this shape."""
    n, c, h, w = shape
    rows, columns = -(-h // side), -(-w // side)
    split = parts.reshape(rows, columns, c, side, side, n).permute(5, 2, 0, 3, 1, 4)
    return split.reshape(n, c, rows * side, columns * side)[..., :h, :w].contiguous()
