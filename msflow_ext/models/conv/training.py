"""Convolutions of flows in training: on the CPU in Winograd's form where it pays."""

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

# A step transforms the weight twice; so many positions are to share that (8x8 576 -> 1024, 8 images, AVX2: 1.4x).
_SHARING = 512


class TrainedConv2d(nn.Conv2d):
    """A convolution whose training on the CPU takes Winograd's form where it pays; else what it inherits.

    Derivatives of derivatives, function transforms, compiled and exported graphs and everything without a gradient take
    the direct convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        form = training_form(input, self)
        if form is None:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        return _Convolution.apply(input, self.weight, self.bias, form)


def training_form(x: Tensor, conv: nn.Conv2d) -> Form | None:
    """As :func:`winograd_form`, for a step of training: where enough positions share the weight's transforms."""
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
    """``function(x)``, with ``x`` as a chain of couplings whose subnets begin with this convolution trains fastest on it.

    Winograd's form reads and writes channels_last. A copy of what the caller keeps is not kept for the backward pass too.

    Raises:
        RuntimeError: in the backward pass, if ``x`` was modified in between.
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
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_transformed(
            grad
        ):  # somebody differentiates this once more
            grad_x = conv2d_input(x.shape, weight.to(x.dtype), grad, padding=1) if wants_x else None
            slope = conv2d_weight(x, weight.shape, grad, padding=1) if wants_weight else None
        else:
            turned = ops.winograd_weight(weight, *ctx.form, adjoint=True) if wants_x else None
            nothing = weight.new_zeros(weight.size(1))
            grad_x = None if turned is None else ops.winograd_conv2d(grad, turned, nothing)
            slope = ops.winograd_weight_grad(x, grad) if wants_weight else None
        shift = grad.sum((0, 2, 3), dtype=weight.dtype) if wants_bias else None
        return grad_x, None if slope is None else slope.to(weight.dtype), shift, None
