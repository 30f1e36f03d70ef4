"""Resampling of the fusion flow: pool all scales to the coarsest and concatenate them; upsample the result and add it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype

# Of one call of the registered op; more scales take several calls.
_SCALES = 8


def pool_and_concatenate(x: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Average-pool maps of several scales to one size and concatenate them over channels.

    Args:
        x: maps ``(N, C_i, H_i, W_i)`` of one N and one dtype: float32, float64, bfloat16 or float16 (on
            the CPU: reference).
        size: ``(h, w)`` of the result; the windows are those of ``torch.nn.AdaptiveAvgPool2d``.

    Returns:
        ``(N, sum C_i, h, w)`` in the memory format of the first map.

    Raises:
        ValueError: no map, shapes or devices do not fit, a size below 1. TypeError: dtypes do not fit.

    Source: MSFlow, the fusion flow's subnet.
    """
    _check_maps(x)
    if min(size) < 1:
        raise ValueError(f"pool_and_concatenate: size must be at least 1, got {tuple(size)}")
    if not _backend.is_native(*x):
        return pool_and_concatenate_reference(x, size)
    if len(x) > _SCALES:
        parts = (pool_and_concatenate(p, size) for p in (x[:_SCALES], x[_SCALES:]))
        return torch.cat(list(parts), 1)
    return _pool(*x, *[None] * (_SCALES - len(x)), *size)[0]


def upsample_and_add(x: Tensor, low: Tensor) -> Tensor:
    r"""``x`` plus a coarser map upsampled to its size, bilinear with the corners aligned.

    Args:
        x: ``(N, C, H, W)``, float32, float64, bfloat16 or float16 (on the CPU: reference).
        low: ``(N, C, h, w)`` of the same dtype, or of half precision beside float32; a slice of channels is read in
            place.

    Returns:
        ``(N, C, H, W)`` in the memory format of ``x`` and the dtype of ``low``, rounded once: under autocast, what the
        next convolution reads.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: dtypes do not fit.

    Source: MSFlow, the fusion flow's subnet.
    """
    _check_pair(x, low)
    if not _backend.is_native(x, low):
        return upsample_and_add_reference(x, low)
    return _upsample(x, low)[0]


def pool_and_concatenate_reference(x: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """:func:`pool_and_concatenate` in plain PyTorch."""
    wide = accumulation_dtype(x[0].dtype)
    pooled = [F.adaptive_avg_pool2d(t.to(wide), size) for t in x]
    return torch.cat(pooled, 1).to(x[0].dtype)


def upsample_and_add_reference(x: Tensor, low: Tensor) -> Tensor:
    """:func:`upsample_and_add` in plain PyTorch."""
    wide = accumulation_dtype(x.dtype)
    up = F.interpolate(low.to(wide), x.shape[2:], mode="bilinear", align_corners=True)
    return (x.to(wide) + up).to(low.dtype)


def _check_maps(x: Sequence[Tensor]) -> None:
    if len(x) == 0:
        raise ValueError("pool_and_concatenate: x holds no map")
    first = x[0]
    for t in x:
        if t.dim() != 4 or t.size(0) != first.size(0) or 0 in t.shape[1:]:
            raise ValueError(
                "pool_and_concatenate: x must be maps (N, C, H, W) of one N, none empty, got "
                f"{[tuple(t.shape) for t in x]}"
            )
        if not t.is_floating_point() or t.dtype is not first.dtype:
            raise TypeError(
                f"pool_and_concatenate: x must be of one floating dtype, got {[t.dtype for t in x]}"
            )
        if t.device != first.device:
            raise ValueError(
                f"pool_and_concatenate: x must be on one device, got {[str(t.device) for t in x]}"
            )


def _check_pair(x: Tensor, low: Tensor) -> None:
    if x.dim() != 4 or low.dim() != 4 or x.shape[:2] != low.shape[:2]:
        raise ValueError(
            "upsample_and_add: x and low must be (N, C, H, W) and (N, C, h, w) of one N and C, got "
            f"{tuple(x.shape)} and {tuple(low.shape)}"
        )
    if 0 in x.shape[1:] or 0 in low.shape[1:]:
        raise ValueError(
            f"upsample_and_add: x and low must not be empty, got {tuple(x.shape)} and {tuple(low.shape)}"
        )
    narrower = (torch.bfloat16, torch.float16) if x.dtype is torch.float32 else ()
    if not x.is_floating_point() or (x.dtype is not low.dtype and low.dtype not in narrower):
        raise TypeError(
            "upsample_and_add: x and low must have one floating dtype, or low half precision beside float32, "
            f"got {x.dtype} and {low.dtype}"
        )
    if x.device != low.device:
        raise ValueError(
            f"upsample_and_add: x and low must be on one device, got {x.device} and {low.device}"
        )


def _job(high: Tensor, low: Tensor, channels_last: bool):
    """The kernels' description of one scale."""
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
