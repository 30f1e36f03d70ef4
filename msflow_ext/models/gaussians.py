"""Gaussians at the positions of maps, estimated in one pass, and the whitening of features by them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How many numbers the covariances of a scale have at most: 256 MiB of float64.
LIMIT = 2**25

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

    def fresh(self) -> Moments:
        """None yet, of the same positions, to be counted and taken off these."""
        found = copy.copy(self)
        found.count = 0
        found._total, found._outer = torch.zeros_like(self._total), torch.zeros_like(self._outer)
        return found

    def without(self, part: Moments) -> Moments:
        """These without some of them, in the place of ``part``."""
        part.count = self.count - part.count
        part._total = self._total - part._total
        part._outer.neg_().add_(self._outer)
        return part

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


class Whitening(nn.Module):
    r"""Whiten features given the coarser scales, with one Gaussian per position.

    Standardised features :math:`x` of a scale are whitened given those of all coarser scales at the same place,
    :math:`u` (bilinear, ``align_corners=False``): what they tell of :math:`x` is taken off, then what is left is whitened,

    .. math:: x'_p = S_p^{-1/2} \left(x_p - \mu_p - B_p (u_p - \nu_p)\right), \qquad
        B_p = \Sigma_p^{xu} (\Sigma_p^{uu})^{-1}, \quad S_p = \Sigma_p^{xx} - B_p \Sigma_p^{ux},

    as the Gaussian of all scales together has it. :math:`\Sigma_p` is the covariance of K channels over :math:`n_p` vectors
    (images times positions of the cell) and, to make few of them steady, over K further ones, whose covariance is the mean
    of all cells plus :math:`0.1\, I`. The symmetric root leaves each channel as near to itself as can be: alike at all
    positions, which share the flow's weights.

    Images that a flow shall learn are whitened by the others, see :meth:`msflow_ext.features.Features.standardize`: by
    themselves they come out far shorter than any new one, which the flow then never saw the like of.

    Memory: a scale's channels times K numbers a cell, and twice :math:`K^2` of 8 bytes while fitting: 15 MB and 0.35 GB for
    efficientnet_lite0 at 192 pixels, 0.15 and 1.1 GB for wide_resnet50_2 at 512, where 22 x 22, 11 x 11 and 4 x 4 positions
    of its scales make a cell.

    Every position has a mean and a covariance of its own; but where those of a scale took more than 2^25 numbers, the
    positions of a cell, a square as small as can be, share a covariance about their means.

    Args:
        channels: of each scale.
        sizes: ``(height, width)`` of each scale.

    Attributes:
        one_by_one: whether each image is whitened by itself, so that a batch does not change its rounding.
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
        self.take(self.count(batches, total))

    @torch.no_grad()
    def count(
        self,
        batches: Iterable[Sequence[Tensor]],
        total: Total = alone,
        like: Sequence[Moments] = (),
    ) -> list[Moments]:
        """The moments of batches, of each scale; ``like``: those of all images, of which these are some."""
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
        """Whiten by these moments, which cannot be used after.

        Raises:
            ValueError: they are of fewer than two images.
        """
        if not moments or moments[0].count < 2:
            raise ValueError("Whitening.fit: batches must hold at least two images")
        for i, each in enumerate(moments):
            mean, covariance = each.mean_and_covariance()
            self.get_buffer(f"mean{i}").copy_(mean)
            self.regularize(covariance, each)
            kept = self.get_buffer(f"whiten{i}")
            parts = zip(kept.split(64), covariance.split(64), strict=True)
            for whiten, part in parts:  # factors take several times their memory
                whiten.copy_(self.factor(part, whiten.size(1)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[(N, C_i, H_i, W_i)]`` by the Gaussians of their positions, in the module's dtype.

        Raises:
            ValueError: maps of other sizes.
        """
        found = [tuple(x.shape[1:]) for x in maps]
        if found != self.scales:
            raise ValueError(f"maps must be {self.scales} (channels, height, width), got {found}")
        if self.one_by_one and len(maps[0]) > 1:
            single = [self([x[n : n + 1] for x in maps]) for n in range(len(maps[0]))]
            return [torch.cat(scale) for scale in zip(*single, strict=True)]
        whitened = []
        for i, (y, side) in enumerate(zip(self.joined(maps), self.sides, strict=True)):
            parts = cells(y - self.get_buffer(f"mean{i}"), side)
            whitened.append(_maps(self.get_buffer(f"whiten{i}") @ parts, side, maps[i].shape))
        return whitened

    def width(self, scale: int) -> int:
        """How many numbers a Gaussian of this scale is of: its channels, and those of all coarser scales."""
        return sum(c for c, *_ in self.scales[scale:])

    def joined(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the Gaussians are of, the scale's own channels first: ``[(N, width, H_i, W_i)]``."""
        return [
            torch.cat((x, *(resize(u, x.shape[2:]) for u in maps[i + 1 :])), 1)
            for i, x in enumerate(maps)
        ]

    def regularize(self, covariance: Tensor, moments: Moments) -> None:
        """Change covariances ``(cells, K, K)`` from these moments in place, such that they can be inverted."""
        width, weights = covariance.size(1), moments.positions
        usual = torch.einsum("kij,k->ij", covariance, weights[:, 0, 0]) / weights.sum()
        usual.diagonal().add_(0.1)
        share = moments.count * weights / (moments.count * weights + width)
        covariance.mul_(share).addcmul_(1 - share, usual)

    def factor(self, covariance: Tensor, channels: int) -> Tensor:
        """The matrices ``(..., channels, K)`` that whiten the first channels of what has covariances ``(..., K, K)``."""
        own, coarser = covariance[..., :channels, :channels], covariance[..., channels:, channels:]
        across = covariance[..., channels:, :channels]
        slope = torch.cholesky_solve(across, torch.linalg.cholesky(coarser)).mT
        variances, axes = torch.linalg.eigh(own - slope @ across)
        root = (axes * variances.rsqrt().unsqueeze(-2)) @ axes.mT
        return torch.cat((root, -root @ slope), -1)


def resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Maps ``(N, C, H, W)`` on another grid ``(height, width)``."""
    return F.interpolate(x, size=list(grid), mode="bilinear", align_corners=False)


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
