"""Convolutions of flows in training, which use Winograd's algorithm on the CPU if it is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from msflow_ext import ops
from msflow_ext.activations import recomputed
from msflow_ext.models.conv.winograd import Form, winograd_form
from msflow_ext.ops._backend import is_transformed

# A step transforms the weight twice, which pays from this many positions on (8x8 576 -> 1024, 8 images, AVX2: 1.4x).
_SHARING = 512


class TrainedConv2d(nn.Conv2d):
    """``Conv2d`` that uses Winograd's algorithm in training on the CPU if it is faster.

    Higher derivatives, function transforms, compiled and exported graphs, and calls without a gradient use the direct
    convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        form = training_form(input, self)
        if form is None:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        return _Convolution.apply(input, self.weight, self.bias, form)


def training_form(x: Tensor, conv: nn.Conv2d) -> Form | None:
    """Return :func:`winograd_form` for a train step, or None if too few positions share the weight's transforms."""
    weight = conv.weight
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return None
    if is_transformed(x, weight):
        return None
    positions = x.size(0) * x.size(2) * x.size(3)
    if x.device.type != "cpu" or positions < _SHARING:
        return None
    if (conv.padding, conv.padding_mode, weight.dtype) != ((1, 1), "zeros", torch.float32):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return winograd_form(positions, dtype, weight, (1, 1), conv.stride, conv.dilation, conv.groups)


def laid_out(function: Callable[[Tensor], Any], x: Tensor, conv: nn.Conv2d) -> Any:
    """Return ``function(x)`` with ``x`` in the fastest memory format for training couplings with this convolution.

    Winograd's algorithm reads and writes channels_last. If ``x`` needs a copy, the backward pass makes it again instead of
    keeping it.

    Raises:
        RuntimeError: in the backward pass, if ``x`` has been modified.
    """
    if training_form(x, conv) is None or x.is_contiguous(memory_format=torch.channels_last):
        return function(x)
    if x.requires_grad or x.is_inference():
        return function(_channels_last(x))
    return recomputed(function, _channels_last, x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = form
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        return ops.winograd_conv2d(x, ops.winograd_weight(weight, *form), shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_transformed(grad):  # for a second derivative
            grad_x = conv2d_input(x.shape, weight.to(x.dtype), grad, padding=1) if needs_x else None
            slope = conv2d_weight(x, weight.shape, grad, padding=1) if needs_weight else None
        else:
            turned = ops.winograd_weight(weight, *ctx.form, adjoint=True) if needs_x else None
            no_bias = weight.new_zeros(weight.size(1))
            grad_x = None if turned is None else ops.winograd_conv2d(grad, turned, no_bias)
            slope = ops.winograd_weight_grad(x, grad) if needs_weight else None
        shift = grad.sum((0, 2, 3), dtype=weight.dtype) if needs_bias else None
        return grad_x, None if slope is None else slope.to(weight.dtype), shift, None
