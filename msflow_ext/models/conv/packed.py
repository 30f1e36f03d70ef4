"""A convolution for inference: packed weight, channels_last, with what follows it in the same pass."""

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

#: Images for which a convolution's form is chosen, however many there are. Measured with a wide_resnet50_2 at 512 px,
#: bfloat16 and float32: forms for one image take 1.2 and 1.5 times as long in batches of 4, forms for four are as fast for one.
NOMINAL_BATCH = 4

#: Activations that may follow in the same pass: the library's name and numbers for it, and torch's function.
ACTIVATIONS: dict[str, tuple[str, list[float], Callable[[Tensor], Tensor]]] = {
    "none": ("none", [], lambda y: y),
    "relu": ("relu", [], F.relu_),
    "relu6": ("hardtanh", [0.0, 6.0], partial(F.relu6, inplace=True)),
    "silu": ("swish", [], partial(F.silu, inplace=True)),
    "hardswish": ("hardswish", [], partial(F.hardswish, inplace=True)),
}


class PackedConv2d(nn.Module):
    """A convolution in the form that is fastest for its sizes, with the weight as that form wants it.

    The size of a map decides, and not how many maps there are: an image scores alone as it does in a batch.
    Winograd's form is taken where it pays for ``NOMINAL_BATCH`` images (:func:`~msflow_ext.models.conv.winograd.winograd_form`; its
    weight takes 1.8 or 4 times the memory), else the layout that the library would otherwise make at every call. That
    layout comes from what torch's own freezing emits, which is private: where it is missing or refuses, plain
    ``conv2d`` on a channels_last weight is the same convolution. Where the processor has no instructions for bfloat16,
    such a convolution is one in float32 between two casts.

    Packed weights of the last ``_MOST`` sizes are kept. A copy and a pickle hold none of them and pack anew.

    Args:
        conv: any ``Conv2d``, or timm's ``Conv2dSame``, which pads as TensorFlow does; its weight is shared and must not
            change.
        dtype: of input and output.
        activation: one of ``ACTIVATIONS``, in the same pass.
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
        """``activation(conv(x) + other)``; ``other`` has the result's shape."""
        if self.same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        elif self.border:
            x = F.pad(x, self.border, mode=self.mode)
        convolve = self._forms.get(tuple(x.shape[2:]))
        if convolve is not None:
            return convolve(x, other)
        if is_transformed(x, self.weight):  # nothing of a graph or of fake tensors is kept
            return self._direct(x, self.dtype, pack=False)(x, other)
        return self._packed_for(x)(x, other)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}

    def _packed_for(self, x: Tensor) -> Callable[..., Tensor]:
        size = tuple(x.shape[2:])
        with _PACKING:
            if size not in self._forms:  # or another thread has packed meanwhile
                if len(self._forms) == _MOST:
                    self._forms.pop(next(iter(self._forms)))
                self._forms[size] = self._form(x)
            return self._forms[size]

    def _form(self, x: Tensor) -> Callable[..., Tensor]:
        options = (self.padding, self.stride, self.dilation, self.groups)
        positions = NOMINAL_BATCH * x.size(2) * x.size(3)
        form = winograd_form(positions, x.dtype, self.weight, *options)
        if form is not None:
            wide = ops.accumulation_dtype(self.dtype)
            bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
            weight = ops.winograd_weight(self.weight, *form)
            return partial(_winograd, weight, bias.to(wide), self.padding, self.activation)
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
    if activation not in ("none", "relu"):  # the library has no others after an addition
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
