"""Resampling of the fusion flow: pool all scales to one size and concatenate; upsample a result and add it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype

# Largest number of maps in one call of the registered op; more maps use several calls.
_SCALES = 8


def pool_and_concatenate(x: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Average-pool maps of several scales to one size and concatenate them over channels.

    Args:
        x: Maps of one dtype: float32, float64, bfloat16 or float16. The reference runs float16 on the CPU.
        size: Height and width of the result. The windows are those of ``torch.nn.AdaptiveAvgPool2d``.

    Shape:
        - x: ``(N, C_i, H_i, W_i)`` each, with equal ``N``.

    Returns:
        ``(N, sum C_i, *size)`` in the memory format of the first map.

    Raises:
        ValueError: There is no map, a shape or a device does not fit, or a size is below 1.
        TypeError: A dtype does not fit.

    Examples:
        >>> maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
        >>> pool_and_concatenate(maps, (4, 4)).shape
        torch.Size([2, 8, 4, 4])

    References:
        The fusion flow's subnet of MSFlow.
    """
    _check_maps(x)
    if min(size) < 1:
        raise ValueError(f"size must be at least 1, got {tuple(size)}")
    if not _backend.is_native(*x):
        return pool_and_concatenate_reference(x, size)
    if len(x) > _SCALES:
        parts = (pool_and_concatenate(p, size) for p in (x[:_SCALES], x[_SCALES:]))
        return torch.cat(list(parts), 1)
    return _pool(*x, *[None] * (_SCALES - len(x)), *size)[0]


def upsample_and_add(x: Tensor, low: Tensor) -> Tensor:
    r"""Upsample a coarser map to the size of ``x``, bilinear with aligned corners, and add it to ``x``.

    Args:
        x: Map in float32, float64, bfloat16 or float16. The reference runs float16 on the CPU.
        low: Coarser map in the dtype of ``x``, or in half precision if ``x`` is float32. A slice of channels is read
            without a copy.

    Shape:
        - x: ``(N, C, H, W)``.
        - low: ``(N, C, h, w)``.

    Returns:
        ``(N, C, H, W)`` in the memory format of ``x`` and the dtype of ``low``, rounded once. Under autocast the next
        convolution reads this dtype.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> x, low = torch.zeros(1, 1, 3, 3), torch.tensor([[[[0.0, 2.0], [2.0, 4.0]]]])
        >>> upsample_and_add(x, low)[0, 0]
        tensor([[0., 1., 2.],
                [1., 2., 3.],
                [2., 3., 4.]])

    References:
        The fusion flow's subnet of MSFlow.
    """
    _check_pair(x, low)
    if not _backend.is_native(x, low):
        return upsample_and_add_reference(x, low)
    return _upsample(x, low)[0]


def pool_and_concatenate_reference(x: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Compute :func:`pool_and_concatenate` in plain PyTorch."""
    accumulation = accumulation_dtype(x[0].dtype)
    pooled = [F.adaptive_avg_pool2d(t.to(accumulation), size) for t in x]
    return torch.cat(pooled, 1).to(x[0].dtype)


def upsample_and_add_reference(x: Tensor, low: Tensor) -> Tensor:
    """Compute :func:`upsample_and_add` in plain PyTorch."""
    accumulation = accumulation_dtype(x.dtype)
    up = F.interpolate(low.to(accumulation), x.shape[2:], mode="bilinear", align_corners=True)
    return (x.to(accumulation) + up).to(low.dtype)


def _check_maps(x: Sequence[Tensor]) -> None:
    if len(x) == 0:
        raise ValueError("x must hold at least one map, got none")
    first = x[0]
    for t in x:
        if t.dim() != 4 or t.size(0) != first.size(0) or 0 in t.shape[1:]:
            raise ValueError(
                "x must be non-empty maps of shape (N, C, H, W) with equal N, got "
                f"{[tuple(t.shape) for t in x]}"
            )
        if not t.is_floating_point() or t.dtype is not first.dtype:
            raise TypeError(
                f"x must have the same floating-point dtype for all maps, got {[t.dtype for t in x]}"
            )
        if t.device != first.device:
            raise ValueError(
                f"x must be on the same device for all maps, got {[str(t.device) for t in x]}"
            )


def _check_pair(x: Tensor, low: Tensor) -> None:
    if x.dim() != 4 or low.dim() != 4 or x.shape[:2] != low.shape[:2]:
        raise ValueError(
            "x and low must have shapes (N, C, H, W) and (N, C, h, w) with equal N and C, got "
            f"{tuple(x.shape)} and {tuple(low.shape)}"
        )
    if 0 in x.shape[1:] or 0 in low.shape[1:]:
        raise ValueError(
            f"x and low must not be empty, got {tuple(x.shape)} and {tuple(low.shape)}"
        )
    narrower = (torch.bfloat16, torch.float16) if x.dtype is torch.float32 else ()
    if not x.is_floating_point() or (x.dtype is not low.dtype and low.dtype not in narrower):
        raise TypeError(
            "x and low must have the same floating-point dtype, or low half precision if x is float32, "
            f"got {x.dtype} and {low.dtype}"
        )
    if x.device != low.device:
        raise ValueError(f"x and low must be on the same device, got {x.device} and {low.device}")


def _job(high: Tensor, low: Tensor, channels_last: bool):
    """Describe one scale to the kernels."""
    return _backend.C.Resample(
        (high.size(0), high.size(1)), tuple(high.shape[2:]), tuple(low.shape[2:]), channels_last
    )


def _slices(whole: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    return list(whole.split([t.size(1) for t in maps], 1))


def _allocate_pool(*args):
    *maps, height, width = args
    maps = [t for t in maps if t is not None]
    channels_last, channels = _backend.is_channels_last(maps[0]), sum(t.size(1) for t in maps)
    return (_backend.empty(maps[0], channels, channels_last, size=(height, width)),)


def _run_pool(results, *args):
    maps = [t for t in args[:-2] if t is not None]
    channels_last = _backend.is_channels_last(results[0])
    for x, low in zip(maps, _slices(results[0], maps), strict=True):
        _keep, v = _backend.views(channels_last, x, low)
        _backend.run("pool_forward", x, _job(x, low, channels_last), *v)


def _allocate_pool_grads(*args):
    return tuple(
        None if t is None else _backend.empty(t, t.size(1), _backend.is_channels_last(t))
        for t in args[:-2]
    )


def _run_pool_backward(upstream, grads, _extra, *args):
    maps = [t for t in args[:-2] if t is not None]
    for grad_x, grad_low in zip(grads, _slices(upstream[0], maps), strict=False):
        channels_last = _backend.is_channels_last(grad_x)
        _keep, v = _backend.views(channels_last, grad_low, grad_x)
        _backend.run("pool_backward", grad_x, _job(grad_x, grad_low, channels_last), *v)


def _allocate_upsample(x, low):
    return (_backend.empty(x, x.size(1), _backend.is_channels_last(x), low.dtype),)


def _run_upsample(results, x, low):
    channels_last = _backend.is_channels_last(x)
    _keep, v = _backend.views(channels_last, x, low, *results)
    _backend.run("upsample_forward", x, _job(x, low, channels_last), *v)


def _allocate_upsample_grads(x, low):
    return tuple(_backend.empty(t, t.size(1), _backend.is_channels_last(x)) for t in (x, low))


def _run_upsample_backward(upstream, grads, _extra, x, low):
    grads[0].copy_(upstream[0])
    channels_last = _backend.is_channels_last(grads[1])
    _keep, v = _backend.views(channels_last, upstream[0], grads[1])
    _backend.run("upsample_backward", upstream[0], _job(x, low, channels_last), *v)


_pool = NativeOp(
    "pool_and_concatenate",
    f"(Tensor x0, {', '.join(f'Tensor? x{i}' for i in range(1, _SCALES))}, int height, int width) -> Tensor",
    allocate=_allocate_pool,
    run=_run_pool,
    reference=lambda *args: pool_and_concatenate_reference(
        [t for t in args[:-2] if t is not None], args[-2:]
    ),
    tensors=_SCALES,
    allocate_grads=_allocate_pool_grads,
    run_backward=_run_pool_backward,
)
_upsample = NativeOp(
    "upsample_and_add",
    "(Tensor x, Tensor low) -> Tensor",
    allocate=_allocate_upsample,
    run=_run_upsample,
    reference=upsample_and_add_reference,
    tensors=2,
    allocate_grads=_allocate_upsample_grads,
    run_backward=_run_upsample_backward,
)
