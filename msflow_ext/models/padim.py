"""PaDiM-style baseline: a Gaussian at every position of the feature maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from msflow_ext.models.gaussians import Moments, Total, cells, one_process, resize


@dataclass(frozen=True)
class PadimPrediction:
    """Scores and maps of a batch of images.

    Attributes:
        score: ``(N,)``, the maximum of each map.
        anomaly_map: ``(N, S, S)``, Mahalanobis distances.
    """

    score: Tensor
    anomaly_map: Tensor


class Padim:
    r"""Mahalanobis distance to the normal images at every position.

    All scales are resized (bilinear) to the finest grid and concatenated to :math:`x` of C channels.
    Over N training images, position p has the mean :math:`\mu_p` and

    .. math::
        \Sigma_p = \tfrac{1}{N - 1} \textstyle\sum_k (x_{kp} - \mu_p)(x_{kp} - \mu_p)^T + 0.01\, I,
        \qquad M_p(x) = \sqrt{(x_p - \mu_p)^T \Sigma_p^{-1} (x_p - \mu_p)}.

    Differences from PaDiM: all channels instead of a random choice, bilinear instead of bicubic maps,
    and no Gaussian filter over the map. On brick and ELPV, a filter of 4 pixels changes no AUROC by
    more than 0.3 points.

    Memory: H * W * C^2 numbers in the dtype of the features (float32 or wider), and twice as many in
    float64 while fitting. That is 71 MB and 290 MB for 24 x 24 positions of 176 channels.

    References:
        Defard et al., "PaDiM", ICPR workshops 2021, equation 2.
    """

    def __init__(self) -> None:
        self._gaussians: tuple[Tensor, Tensor, tuple[int, ...]] | None = None

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]], total: Total = one_process) -> Padim:
        """Estimate the Gaussians in one pass over normal images, and return self.

        Args:
            batches: features of each batch.
            total: sums a tensor over the processes, if each has a share of the batches.

        Shape:
            batches: ``(N, C_i, H_i, W_i)`` per scale; only N may differ between batches.

        Raises:
            ValueError: fewer than two images, shapes that differ, or features that are not finite.
            TypeError: features that are not floating point.
        """
        stream = (_embed(features) for features in batches)
        first = next(stream, None)
        if first is None:
            raise ValueError("batches must hold at least two images, got none")
        moments = Moments(first, total)
        for x in chain([first], stream):
            _check_shape(x, first.shape[1:])
            moments.add(x)
        moments.join()
        if moments.count < 2:
            raise ValueError("batches must hold at least two images, got 1")
        mean, covariance = moments.mean_and_covariance()
        covariance.diagonal(dim1=1, dim2=2).add_(0.01)
        factor = torch.linalg.cholesky(covariance)
        self._gaussians = mean.to(first), factor.to(first), first.shape[1:]
        return self

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], size: int) -> PadimPrediction:
        """Return maps of ``size`` x ``size`` pixels and their maxima.

        Shape:
            features: ``(N, C_i, H_i, W_i)`` per scale, as in :meth:`fit`.

        Raises:
            ValueError: ``size`` is below 1, or ``features`` has other shapes or is not finite.
            TypeError: features that are not floating point.
            RuntimeError: :meth:`fit` was not called.
        """
        if self._gaussians is None:
            raise RuntimeError("this Padim is not fitted: call fit first")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        mean, factor, shape = self._gaussians
        x = _embed(features)
        _check_shape(x, shape)
        whitened = torch.linalg.solve_triangular(factor, cells(x - mean), upper=False)
        distance = torch.linalg.vector_norm(whitened, dim=1).T.reshape(-1, 1, *shape[1:])
        maps = resize(distance, (size, size)).squeeze(1)
        return PadimPrediction(maps.amax((1, 2)), maps)


def _embed(features: Sequence[Tensor]) -> Tensor:
    """Concatenate all scales on the finest grid, ``(N, C, H, W)``, in float32 or wider."""
    if not len(features):
        raise ValueError("features must hold at least one map, got none")
    for i, x in enumerate(features):
        if not x.is_floating_point():
            raise TypeError(f"features[{i}] must be floating point, got {x.dtype}")
        if x.dim() != 4 or 0 in x.shape or x.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{i}] must be (N, C, H, W), not empty, with the same N on all scales, "
                f"got {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"features[{i}] must be finite, got NaN or infinity")
    grid = max((x.shape[2:] for x in features), key=lambda shape: shape.numel())
    accumulated = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in features)
    return torch.cat([resize(x, grid) for x in accumulated], dim=1)


def _check_shape(x: Tensor, fitted: tuple[int, ...]) -> None:
    if x.shape[1:] != fitted:
        raise ValueError(
            f"features must concatenate to (C, H, W) = {tuple(fitted)}, as in the first batch, "
            f"got {tuple(x.shape[1:])}"
        )
