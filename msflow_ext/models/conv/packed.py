"""Convolution for inference: packed weight, channels_last, fused with addition and activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.hardware import has_bfloat16
from msflow_ext.models.conv.winograd import winograd_form
from msflow_ext.ops._backend import is_transformed

_PACKING = Lock()
_MOST = 4

#: Batch size for which the algorithm is chosen, whatever the actual one is. Measured with wide_resnet50_2 at 512 px in
#: bfloat16 and float32: in batches of 4, the choice for 1 takes 1.2 and 1.5 times as long. For 1, both are equally fast.
NOMINAL_BATCH = 4

#: Activations that can be fused: oneDNN's name and parameters, and torch's function.
ACTIVATIONS: dict[str, tuple[str, list[float], Callable[[Tensor], Tensor]]] = {
    "none": ("none", [], lambda y: y),
    "relu": ("relu", [], F.relu_),
    "relu6": ("hardtanh", [0.0, 6.0], partial(F.relu6, inplace=True)),
    "silu": ("swish", [], partial(F.silu, inplace=True)),
    "hardswish": ("hardswish", [], partial(F.hardswish, inplace=True)),
}


class PackedConv2d(nn.Module):
    """Convolution by the fastest algorithm for its sizes, with the weight packed for that algorithm.

    The choice depends on the size of a map, not on the batch size. So the result for an image does not depend on the
    batch. The algorithms are, in this order:

    * Winograd's, if it is faster for ``NOMINAL_BATCH`` images
      (:func:`~msflow_ext.models.conv.winograd.winograd_form`). Its weight needs 1.8 or 4 times the memory.
    * For bfloat16 on a processor without such instructions: float32 between two casts.
    * oneDNN's, with a weight in the layout that oneDNN would otherwise compute at every call. The operators are private
      ones of torch's freezing.
    * ``conv2d`` on a channels_last weight, if these operators are missing or refuse.

    Packed weights of the last ``_MOST`` sizes are kept, but are not part of a copy or a pickle.

    Args:
        conv: any ``Conv2d``, or timm's ``Conv2dSame``, which pads as TensorFlow does. Its weight is shared and must not
            change.
        dtype: dtype of input and output.
        activation: activation to fuse, one of ``ACTIVATIONS``.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, activation: str = "none") -> None:
        super().__init__()
        self.weight: Tensor = conv.weight.detach()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.border: list[int] = []
        self.padding: Any = conv.padding
        if conv.padding_mode != "zeros":  # as Conv2d does: pad first, then convolve without padding
            self.border, self.padding = list(conv._reversed_padding_repeated_twice), (0, 0)
        self.mode = conv.padding_mode
        self.kernel_size, self.same = conv.kernel_size, isinstance(conv, Conv2dSame)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.dtype, self.activation = dtype, activation
        self._forms: dict[tuple[int, ...], Callable[..., Tensor]] = {}

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return ``activation(conv(x) + other)``; ``other`` has the shape of the result."""
        if self.same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        elif self.border:
            x = F.pad(x, self.border, mode=self.mode)
        convolve = self._forms.get(tuple(x.shape[2:]))
        if convolve is not None:
            return convolve(x, other)
        if is_transformed(x, self.weight):  # a tensor of a graph, or a fake one, must not be kept
            return self._direct(x, self.dtype, pack=False)(x, other)
        return self._packed_for(x)(x, other)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}

    def _packed_for(self, x: Tensor) -> Callable[..., Tensor]:
        size = tuple(x.shape[2:])
        with _PACKING:
            if size not in self._forms:  # unless another thread has packed meanwhile
                if len(self._forms) == _MOST:
                    self._forms.pop(next(iter(self._forms)))
                self._forms[size] = self._form(x)
            return self._forms[size]

    def _form(self, x: Tensor) -> Callable[..., Tensor]:
        options = (self.padding, self.stride, self.dilation, self.groups)
        positions = NOMINAL_BATCH * x.size(2) * x.size(3)
        form = winograd_form(positions, x.dtype, self.weight, *options)
        if form is not None:
            accumulation = ops.accumulation_dtype(self.dtype)
            bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
            weight = ops.winograd_weight(self.weight, *form)
            return partial(_winograd, weight, bias.to(accumulation), self.padding, self.activation)
        on_cpu = x.device.type == "cpu"
        if self.dtype is torch.bfloat16 and on_cpu and not has_bfloat16():
            return partial(_between_casts, self._direct(x.float(), torch.float32))
        return self._direct(x, self.dtype)

    def _direct(self, x: Tensor, dtype: torch.dtype, *, pack: bool = True) -> Callable[..., Tensor]:
        options = (self.padding, self.stride, self.dilation, self.groups)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype, memory_format=torch.channels_last)
        known = dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
        if pack and known and not isinstance(self.padding, str):
            try:
                packed = torch.ops.mkldnn._reorder_convolution_weight(
                    weight, *options, [1, *x.shape[1:]]
                )
            except (AttributeError, RuntimeError):
                pass
            else:
                return partial(_packed, packed, bias, options, self.activation)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return partial(_plain, weight, bias, options, self.activation)


def _winograd(
    weight: Tensor, bias: Tensor, padding: Any, activation: str, x: Tensor, other: Tensor | None
) -> Tensor:
    relu = activation == "relu" and other is None
    y = ops.winograd_conv2d(x, weight, bias, padding=padding, relu=relu)
    return y if relu else _finish(y, other, activation)


def _between_casts(convolve: Callable[..., Tensor], x: Tensor, other: Tensor | None) -> Tensor:
    return convolve(x.float(), None if other is None else other.float()).to(x.dtype)


def _packed(
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    activation: str,
    x: Tensor,
    other: Tensor | None,
) -> Tensor:
    convolve = torch.ops.mkldnn._convolution_pointwise
    name, numbers, _ = ACTIVATIONS[activation]
    if other is None:
        return convolve(x, weight, bias, *options, name, numbers, "")
    if activation not in ("none", "relu"):  # oneDNN fuses no others after an addition
        return _finish(convolve(x, weight, bias, *options, "none", [], ""), other, activation)
    after = None if activation == "none" else activation
    return convolve.binary(x, other, weight, bias, *options, "add", 1.0, after, [], "")


def _plain(
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    activation: str,
    x: Tensor,
    other: Tensor | None,
) -> Tensor:
    return _finish(F.conv2d(x, weight, bias, *options), other, activation)


def _finish(y: Tensor, other: Tensor | None, activation: str) -> Tensor:
    if other is not None:
        y = y.add_(other)
    return ACTIVATIONS[activation][2](y)
