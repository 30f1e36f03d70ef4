"""Inference forms of convolutional networks: batch norms folded away, weights prepacked, channels_last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from msflow_ext import ops
from msflow_ext.models.processor import has_bfloat16
from msflow_ext.models.winograd import winograd_form

_DECIDING = Lock()


class PackedConv2d(nn.Module):
    """A convolution in the form that is fastest for its sizes, with the weight as that form wants it.

    The first input decides: Winograd's form where it pays (:func:`~msflow_ext.models.winograd.winograd_form`; its
    weight takes 1.8 or 4 times the memory), else the layout that the library would otherwise make at every call. That
    layout comes from what torch's own freezing emits, which is private: where it is missing or refuses, plain
    ``conv2d`` on a channels_last weight is the same convolution. Where the processor has no instructions for bfloat16,
    such a convolution is one in float32 between two casts.

    Args:
        conv: any ``Conv2d``, or timm's ``Conv2dSame``, which pads as TensorFlow does; a snapshot is taken.
        dtype: of input and output.
        relu: whether a ReLU follows, in the same pass.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, relu: bool = False) -> None:
        super().__init__()
        self.weight: Tensor | None = conv.weight.detach().clone()
        self.bias = None if conv.bias is None else conv.bias.detach().clone()
        self.border: list[int] = []
        self.padding: Any = conv.padding
        if conv.padding_mode != "zeros":  # as Conv2d does: pad first, then convolve without padding
            self.border, self.padding = list(conv._reversed_padding_repeated_twice), (0, 0)
        self.mode = conv.padding_mode
        self.kernel_size, self.same = conv.kernel_size, isinstance(conv, Conv2dSame)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.dtype, self.relu = dtype, relu
        self.convolve: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        elif self.border:
            x = F.pad(x, self.border, mode=self.mode)
        if self.convolve is None:
            with _DECIDING:
                if self.convolve is None:  # or another thread has decided meanwhile
                    self.convolve = self._form(x)
                    self.weight = self.bias = None
        return self.convolve(x)

    def _form(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        assert self.weight is not None
        options = (self.padding, self.stride, self.dilation, self.groups)
        form = winograd_form(x, x.dtype, self.weight, *options)
        if form is not None:
            wide = ops.accumulation_dtype(self.dtype)
            bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
            return partial(
                ops.winograd_conv2d,
                weight=ops.winograd_weight(self.weight, *form),
                bias=bias.to(wide),
                padding=self.padding,
                relu=self.relu,
            )
        on_cpu = x.device.type == "cpu"
        if self.dtype is torch.bfloat16 and on_cpu and not has_bfloat16():
            return partial(_between_casts, self._direct(x.float(), torch.float32))
        return self._direct(x, self.dtype)

    def _direct(self, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        assert self.weight is not None
        options = (self.padding, self.stride, self.dilation, self.groups)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype, memory_format=torch.channels_last)
        known = dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
        if known and not isinstance(self.padding, str):
            try:
                packed = torch.ops.mkldnn._reorder_convolution_weight(
                    weight, *options, list(x.shape)
                )
            except (AttributeError, RuntimeError):
                pass
            else:
                return partial(_packed, packed, bias, options, "relu" if self.relu else "none")
        options = (self.stride, self.padding, self.dilation, self.groups)
        return partial(_plain, weight, bias, options, self.relu)


def _between_casts(convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return convolve(x.float()).to(x.dtype)


def _packed(
    weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], activation: str, x: Tensor
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *options, activation, [], "")


def _plain(
    weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], relu: bool, x: Tensor
) -> Tensor:
    y = F.conv2d(x, weight, bias, *options)
    return F.relu_(y) if relu else y


def optimize_network(network: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen network with batch norms folded and convolutions packed.

    Args:
        network: in evaluation mode; returns a tensor or a list of them.
        example: float32 input ``(1, C, H, W)``: it shows which batch norm follows which convolution, and that the
            copy gives the same results.
        dtype: float32 or bfloat16, of weights and activations.

    Returns:
        The copy; batch norms that do not directly follow a convolution stay.
    """
    copied = copy.deepcopy(network)
    pairs = _conv_then_norm(copied, example)
    if pairs:
        wanted = _results(copied, example)
        plain = copy.deepcopy(copied)
        for conv, norm in pairs:
            _fold(copied, conv, norm)
        if not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
            for a, b in zip(_results(copied, example), wanted, strict=True)
        ):
            copied = plain
    copied.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Conv2dSame):
            _replace(copied, name, PackedConv2d(module, dtype))
    return copied


def _conv_then_norm(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms whose input is exactly their output, each used once."""
    produced: dict[int, str] = {}
    kept: list[Tensor] = []  # keeps the tensors alive, so that no id is given twice
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                produced[id(output)] = name
                kept.append(output)
            elif id(inputs[0]) in produced:
                pairs.append((produced[id(inputs[0])], name))

        hooks.append(module.register_forward_hook(hook))

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, _BatchNorm)):
            watch(name, module)
    try:
        _results(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = network.get_submodule(conv_name)
    norm: Any = network.get_submodule(norm_name)
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    conv.weight, conv.bias = weight, bias
    # timm's batch norms bring their activation along.
    _replace(network, norm_name, getattr(norm, "act", None) or nn.Identity())


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@torch.no_grad()
def _results(network: nn.Module, example: Tensor) -> list[Tensor]:
    results = network(example)
    return [results] if isinstance(results, Tensor) else list(results)
