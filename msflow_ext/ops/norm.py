"""LayerNorm over the channels of each position, with an optional map added before it and a ReLU after it."""

from __future__ import annotations

import torch
from torch import Tensor

from msflow_ext.ops import _backend
from msflow_ext.ops._native_op import NativeOp
from msflow_ext.ops._shapes import accumulation_dtype, per_channel, positions


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bias_map: Tensor | None = None,
    *,
    relu: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize ``x + bias_map`` over the channels of each position, then apply an affine map and a ReLU.

    .. math:: y = \max\!\Big(0,\; \frac{h - \bar h}{\sqrt{\mathrm{var}(h) + \epsilon}}\, w + b\Big), \quad h = x + m

    Args:
        x: Input: float32, float64, bfloat16 or float16. The reference runs float16 on the CPU.
        weight, bias: Affine map in the accumulation dtype: float64 for float64, otherwise float32.
        bias_map: Map that is added to every sample, in the dtype of ``x`` or the accumulation dtype. In MSFlow it is
            what the preceding convolution computes from the condition.
        relu: If True, replace negative results by 0.
        eps: Number that is added to the biased variance.

    Shape:
        - x: ``(N, C, *)`` with ``C >= 1``.
        - weight, bias: ``(C,)``.
        - bias_map: ``(1, C, *)``.

    Returns:
        ``(N, C, *)`` in the memory format and dtype of ``x``.

    Raises:
        ValueError: A shape, a device or a value does not fit.
        TypeError: A dtype does not fit.

    Examples:
        >>> y = channel_norm(torch.randn(2, 8, 4, 4), torch.ones(8), torch.zeros(8), relu=False)
        >>> torch.allclose(y.mean(1), torch.zeros(2, 4, 4), atol=1e-6)
        True

    References:
        The norm of MSFlow's ``subnet_conv_ln``: ``torch.nn.LayerNorm`` over channels.
    """
    _check(x, weight, bias, bias_map, eps)
    if bias_map is not None:
        bias_map = bias_map.to(accumulation_dtype(x.dtype))
    arguments = (x, weight, bias, bias_map, bool(relu), float(eps))
    if not _backend.is_native(x, weight, bias, bias_map):
        return channel_norm_reference(*arguments)
    return _norm(*arguments)[0]


def channel_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor | None, relu: bool, eps: float
) -> Tensor:
    """Compute :func:`channel_norm` in plain PyTorch, rounding to the dtype of ``x`` once, at the end."""
    h = x.to(accumulation_dtype(x.dtype))
    if bias_map is not None:
        h = h + bias_map
    h = h - h.mean(1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + eps)
    y = h * per_channel(weight, h) + per_channel(bias, h)
    return (torch.relu(y) if relu else y).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, bias_map: Tensor | None, eps: float) -> None:
    if x.dim() < 2 or x.size(1) == 0:
        raise ValueError(f"x must have shape (N, C, *) with C >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
    for name, vector in (("weight", weight), ("bias", bias)):
        _check_vector(x, name, vector)
    if bias_map is not None:
        _check_map(x, bias_map)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_vector(x: Tensor, name: str, vector: Tensor) -> None:
    accumulation = accumulation_dtype(x.dtype)
    if vector.shape != (x.size(1),):
        raise ValueError(
            f"{name} must have shape ({x.size(1)},), one value per channel of x, got {tuple(vector.shape)}"
        )
    if vector.dtype is not accumulation:
        raise TypeError(f"{name} must be {accumulation} for {x.dtype} data, got {vector.dtype}")
    _check_device(x, name, vector)


def _check_map(x: Tensor, bias_map: Tensor) -> None:
    accumulation = accumulation_dtype(x.dtype)
    if bias_map.shape != (1, *x.shape[1:]):
        raise ValueError(
            f"bias_map must have shape {(1, *x.shape[1:])} for x of shape {tuple(x.shape)}, got "
            f"{tuple(bias_map.shape)}"
        )
    if bias_map.dtype not in (x.dtype, accumulation):
        raise TypeError(f"bias_map must be {x.dtype} or {accumulation}, got {bias_map.dtype}")
    _check_device(x, "bias_map", bias_map)


def _check_device(x: Tensor, name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {other.device}")


def _allocate(x, *_):
    y = _backend.empty(x, x.size(1), _backend.is_channels_last(x))
    statistics = x.new_empty((x.size(0), positions(x), 2), dtype=accumulation_dtype(x.dtype))
    return y, statistics


def _run(results, x, weight, bias, bias_map, relu, eps):
    y, statistics = results
    channels_last = _backend.is_channels_last(x)
    _keep, v = _backend.views(channels_last, x, bias_map, y)
    job, _dense = _job(x, channels_last, weight, bias, relu, eps)
    _backend.run("norm_forward", x, job, *v, statistics.data_ptr())


def _allocate_grads(x, weight, bias, bias_map, *_):
    channels_last = _backend.is_channels_last(x)
    grad_map = None if bias_map is None else _backend.empty(bias_map, x.size(1), channels_last)
    grads = (t.new_empty(t.shape) for t in (weight, bias))
    return _backend.empty(x, x.size(1), channels_last), *grads, grad_map


def _run_backward(upstream, grads, extra, x, weight, bias, bias_map, relu, eps):
    grad_x, grad_weight, grad_bias, grad_map = grads
    if x.numel() == 0 and grad_map is not None:
        grad_map.zero_()
    channels_last = _backend.is_channels_last(x)
    _keep, v = _backend.views(channels_last, upstream[0], x, bias_map, grad_x, grad_map)
    job, _dense = _job(x, channels_last, weight, bias, relu, eps)
    vectors = (grad_weight.data_ptr(), grad_bias.data_ptr())

    def scratch():
        return _backend.C.norm_scratch(job, _backend.DTYPES[x.dtype], bias_map is not None)

    arguments = (*v[:3], extra[0].data_ptr(), *v[3:], *vectors)
    _backend.run("norm_backward", x, job, *arguments, scratch=scratch)


def _job(x, channels_last, weight, bias, relu, eps):
    """Describe a call to the kernels. Also return the vectors that the description points to."""
    dense, vectors = _backend.addresses(weight, bias)
    sizes = (x.size(0), x.size(1), positions(x))
    return _backend.C.Norm(sizes, channels_last, relu, eps, *vectors), dense


_norm = NativeOp(
    "channel_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? bias_map, bool relu, float eps) -> (Tensor, Tensor)",
    allocate=_allocate,
    run=_run,
    reference=channel_norm_reference,
    tensors=4,
    extra=1,
    allocate_grads=_allocate_grads,
    run_backward=_run_backward,
)
