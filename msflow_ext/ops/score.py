"""Likelihoods of latent maps, and anomaly maps and scores from the likelihoods of several scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype, positions


@dataclass(frozen=True)
class Aggregate:
    """Anomaly maps and image scores of a batch, from :func:`aggregate`.

    Attributes:
        score: ``(N,)`` in [0, 1], the paper's image score: top-k mean of ``image_map``.
        log_score: ``(N,)`` in nats, ``-log(1 - score)`` without underflow of the exponentials. It ranks images as
            ``score`` does, and it does not saturate.
        nll_score: ``(N,)`` in nats, top-k mean of the negative log-likelihood, summed over scales.
        anomaly_map: ``(N, H, W)``, from the sum of the likelihoods over scales, for localization.
        image_map: ``(N, H, W)`` in [0, 1], from the product of the likelihoods over scales.
    """

    score: Tensor
    log_score: Tensor
    nll_score: Tensor
    anomaly_map: Tensor
    image_map: Tensor


@dataclass(frozen=True)
class MeanAggregate:
    """Anomaly map and image scores of a batch, from :func:`mean_aggregate`.

    Attributes:
        score: ``(N,)`` in [-1, 0], the maximum of ``anomaly_map``.
        anomaly_map: ``(N, H, W)`` in [-1, 0].
    """

    score: Tensor
    anomaly_map: Tensor


def log_likelihood_map(z: Tensor) -> Tensor:
    r"""Compute the standard normal's log-likelihood at each position, per channel and without its constant.

    .. math:: \log p_{n,h,w} = -\tfrac{1}{2C} \textstyle\sum_c z_{n,c,h,w}^2

    Args:
        z: Latent map ``(N, C, *)`` of any floating-point dtype, with ``C >= 1``.

    Returns:
        ``(N, *)`` in nats per channel, in the accumulation dtype: float64 for float64, otherwise float32.

    Raises:
        ValueError: The shape does not fit.
        TypeError: The dtype does not fit.

    Examples:
        >>> log_likelihood_map(torch.full((1, 3, 2), 2.0))
        tensor([[-2., -2.]])
    """
    _check_latent(z)
    if not _backend.is_native(z):
        return log_likelihood_map_reference(z)
    return _square_sums(z)[0] * (-0.5 / z.size(1))


def half_square_norm(z: Tensor) -> Tensor:
    r"""Compute each sample's negative log-likelihood without its constant: :math:`\tfrac12 \lVert z_n \rVert^2`.

    Args:
        z: Latent map ``(N, C, *)`` of any floating-point dtype, with ``C >= 1``.

    Returns:
        ``(N,)`` in nats, in the accumulation dtype: float64 for float64, otherwise float32.

    Raises:
        ValueError: The shape does not fit.
        TypeError: The dtype does not fit.

    Examples:
        >>> half_square_norm(torch.full((1, 3, 2), 2.0))
        tensor([12.])
    """
    _check_latent(z)
    if not _backend.is_native(z):
        return half_square_norm_reference(z)
    return 0.5 * _square_sums(z)[1]


def aggregate(
    log_likelihood: Sequence[Tensor], size: int | tuple[int, int], *, top_k: float = 0.03
) -> Aggregate:
    r"""Compute anomaly maps and image scores from the log-likelihood maps of one or more scales.

    Let :math:`M_i` be the maps upsampled to ``size`` (bilinear, ``align_corners=True``), and :math:`P_i` the upsampled
    :math:`\exp(\log p_i - \max_{h,w} \log p_i)`. All maxima are per image:

    .. math::
        L = \textstyle\sum_i M_i, \quad Q = e^{L - \max L}, \quad \text{image\_map} = \max Q - Q, \quad
        \text{anomaly\_map} = \max \textstyle\sum_i P_i - \sum_i P_i

    ``score`` is the mean of the ``floor(top_k * H * W)`` largest values of ``image_map``, at least one. On CUDA, results
    may differ from torch's for an image whose likelihoods are infinite or near the largest float.

    Args:
        log_likelihood: Maps ``(N, H_i, W_i)`` in float32 or float64, from :func:`log_likelihood_map`.
        size: Side or ``(height, width)`` of the result in pixels.
        top_k: Share of the pixels that the scores average, in (0, 1].

    Raises:
        ValueError: There is no map, a shape does not fit, a size is below 1, or ``top_k`` is outside (0, 1].
        TypeError: A dtype does not fit.

    Examples:
        >>> likely = torch.zeros(1, 4, 4)
        >>> likely[0, 1, 2] = -5.0  # one unlikely position
        >>> result = aggregate([likely], 4, top_k=1 / 16)
        >>> result.nll_score, int(result.anomaly_map.argmax())
        (tensor([5.]), 6)

    References:
        MSFlow, section III-D.
    """
    size = _sides(size)
    _check_maps(log_likelihood, size)
    if not 0 < top_k <= 1:
        raise ValueError(f"top_k must be in (0, 1], got {top_k}")
    k = max(1, int(top_k * (size[0] * size[1])))
    native = _aggregate(log_likelihood, size, k) if _is_native(log_likelihood) else None
    return aggregate_reference(log_likelihood, size, k) if native is None else native


def mean_aggregate(log_likelihood: Sequence[Tensor], size: int | tuple[int, int]) -> MeanAggregate:
    r"""Compute an anomaly map and an image score from the mean likelihood of one or more scales.

    .. math:: \text{anomaly\_map} = -\tfrac{1}{K} \textstyle\sum_i U(e^{\log p_i})

    Here :math:`K` is the number of scales, and :math:`U` upsamples to ``size`` (bilinear, ``align_corners=False``). The
    score is the maximum of the map.

    Args:
        log_likelihood: Maps ``(N, H_i, W_i)`` in float32 or float64, from :func:`log_likelihood_map`.
        size: Side or ``(height, width)`` of the result in pixels.

    Raises:
        ValueError: There is no map, a shape does not fit, or a size is below 1.
        TypeError: A dtype does not fit.

    Examples:
        >>> likely, unlikely = torch.zeros(1, 4, 4), torch.full((1, 2, 2), -100.0)
        >>> mean_aggregate([likely, unlikely], 8).score
        tensor([-0.5000])

    References:
        FastFlow, as ``gathierry/FastFlow`` and anomalib compute it.
    """
    size = _sides(size)
    _check_maps(log_likelihood, size)
    native = _mean_aggregate(log_likelihood, size) if _is_native(log_likelihood) else None
    return mean_aggregate_reference(log_likelihood, size) if native is None else native


def log_likelihood_map_reference(z: Tensor) -> Tensor:
    """Compute :func:`log_likelihood_map` in plain PyTorch."""
    return -0.5 * z.to(accumulation_dtype(z.dtype)).square().mean(1)


def half_square_norm_reference(z: Tensor) -> Tensor:
    """Compute :func:`half_square_norm` in plain PyTorch."""
    return 0.5 * z.to(accumulation_dtype(z.dtype)).square().flatten(1).sum(1)


def aggregate_reference(
    log_likelihood: Sequence[Tensor], size: tuple[int, int], k: int
) -> Aggregate:
    """Compute :func:`aggregate` in plain PyTorch; scores average ``k`` pixels."""
    log_q = sum(_upsample(m, size) for m in log_likelihood)
    p = sum(_upsample(torch.exp(m - m.amax((1, 2), keepdim=True)), size) for m in log_likelihood)
    assert isinstance(log_q, Tensor) and isinstance(p, Tensor)
    lowest = torch.topk(log_q.flatten(1), k, largest=False).values
    highest = log_q.amax((1, 2), keepdim=True)
    image_map = 1 - torch.exp(log_q - highest)
    distance = lowest - highest[:, 0]
    return Aggregate(
        score=(1 - torch.exp(distance)).mean(1),
        log_score=math.log(k) - torch.logsumexp(distance, 1),
        nll_score=-lowest.mean(1),
        anomaly_map=p.amax((1, 2), keepdim=True) - p,
        image_map=image_map,
    )


def mean_aggregate_reference(
    log_likelihood: Sequence[Tensor], size: tuple[int, int]
) -> MeanAggregate:
    """Compute :func:`mean_aggregate` in plain PyTorch."""
    maps = [_upsample(torch.exp(m), size, align_corners=False) for m in log_likelihood]
    anomaly_map = -torch.stack(maps).mean(0)
    return MeanAggregate(anomaly_map.amax((1, 2)), anomaly_map)


def _upsample(x: Tensor, size: tuple[int, int], *, align_corners: bool = True) -> Tensor:
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# Largest number of maps that the CUDA kernels hold; more maps use the reference.
_MAX_SCALES = 16


def _is_native(maps: Sequence[Tensor]) -> bool:
    differentiable = torch.is_grad_enabled() and any(m.requires_grad for m in maps)
    if _backend.runs_cuda(maps[0]) and len(maps) > _MAX_SCALES:
        return False
    return not differentiable and not torch.compiler.is_compiling() and _backend.is_native(*maps)


def _check_maps(maps: Sequence[Tensor], size: tuple[int, int]) -> None:
    if len(maps) == 0:
        raise ValueError("log_likelihood must hold at least one map, got none")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    for m in maps:
        if m.dtype not in (torch.float32, torch.float64) or m.dtype is not maps[0].dtype:
            raise TypeError(
                f"log_likelihood must be all float32 or all float64, got {[m.dtype for m in maps]}"
            )
        if m.device != maps[0].device:
            raise ValueError(
                f"log_likelihood must be on the same device for all maps, got {[str(m.device) for m in maps]}"
            )
        if m.dim() != 3 or m.size(0) != maps[0].size(0) or 0 in m.shape[1:]:
            raise ValueError(
                "log_likelihood must be non-empty maps of shape (N, H, W) with equal N, got "
                f"{[tuple(m.shape) for m in maps]}"
            )


def _check_latent(z: Tensor) -> None:
    if z.dim() < 2 or z.size(1) == 0:
        raise ValueError(f"z must have shape (N, C, *) with C >= 1, got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"z must have a floating-point dtype, got {z.dtype}")


def _aggregate(maps: Sequence[Tensor], size: tuple[int, int], k: int) -> Aggregate | None:
    """Return the kernel's result, or None if a map is not finite: the reference treats it as torch does."""
    maps, n, like = [_backend.in_memory(m).contiguous() for m in maps], maps[0].size(0), maps[0]
    score, log_score, nll_score = (like.new_empty(n) for _ in range(3))
    anomaly_map, image_map = (like.new_empty((n, *size)) for _ in range(2))
    results = (score, log_score, nll_score, anomaly_map, image_map)
    finite = _run_aggregate("aggregate", maps, (*size, k), results)
    return Aggregate(*results) if finite else None


def _mean_aggregate(maps: Sequence[Tensor], size: tuple[int, int]) -> MeanAggregate | None:
    """Return the kernel's result, or None, as :func:`_aggregate`."""
    maps, n, like = [_backend.in_memory(m).contiguous() for m in maps], maps[0].size(0), maps[0]
    results = (like.new_empty(n), like.new_empty((n, *size)))
    finite = _run_aggregate("mean_aggregate", maps, size, results)
    return MeanAggregate(*results) if finite else None


def _run_aggregate(
    entry: str, maps: Sequence[Tensor], sizes: tuple[int, ...], results: tuple[Tensor, ...]
) -> bool:
    """Run a kernel. Return False if the CPU kernel meets values that are not finite; the CUDA kernel supports them."""
    described = [(_backend.address_of(m), m.size(1), m.size(2)) for m in maps]
    start = (_backend.DTYPES[maps[0].dtype], maps[0].size(0))
    finite = _backend.run(
        entry,
        maps[0],
        *start,
        *sizes,
        described,
        *(t.data_ptr() for t in results),
        scratch=lambda: _backend.C.aggregate_scratch(*start, *sizes[:2], described),
    )
    return finite is not False


def _square_sums_reference(z):
    squares = z.to(accumulation_dtype(z.dtype)).square().sum(1)
    return squares, squares.flatten(1).sum(1)


def _allocate(z):
    accumulation = accumulation_dtype(z.dtype)
    return z.new_empty((z.size(0), *z.shape[2:]), dtype=accumulation), z.new_empty(
        z.size(0), dtype=accumulation
    )


def _run(results, z):
    channels_last = _backend.is_channels_last(z)
    _keep, v = _backend.views(channels_last, z)
    sizes = (z.size(0), z.size(1), positions(z), channels_last)
    _backend.run(
        "square_sums",
        z,
        *sizes,
        *v,
        *(r.data_ptr() for r in results),
        scratch=lambda: _backend.C.square_sums_scratch(*sizes, _backend.DTYPES[z.dtype]),
    )


def _allocate_grads(z):
    return (_backend.empty(z, z.size(1), _backend.is_channels_last(z)),)


def _run_backward(upstream, grads, _extra, z):
    per_position, per_sample = upstream
    weight = 2 * (per_position + per_sample.view(-1, *[1] * (z.dim() - 2)))
    torch.mul(z, weight[:, None], out=grads[0])


_square_sums = NativeOp(
    "square_sums",
    "(Tensor z) -> (Tensor, Tensor)",
    allocate=_allocate,
    run=_run,
    reference=_square_sums_reference,
    tensors=1,
    allocate_grads=_allocate_grads,
    run_backward=_run_backward,
)
