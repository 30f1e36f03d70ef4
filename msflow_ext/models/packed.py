"""Inference forms of convolutional networks: batch norms folded away, weights prepacked, channels_last."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from msflow_ext import ops


class PackedConv2d(nn.Module):
    """A convolution whose weight waits in the layout that the library would otherwise make at every call.

    The layout comes from what torch's own freezing emits, which is private: where it is missing or refuses, plain
    ``conv2d`` on a channels_last weight is the same convolution.

    Args:
        conv: any ``Conv2d``; a snapshot is taken.
        dtype: of weight, input and output.
        relu: whether a ReLU follows, in the same pass.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, relu: bool = False) -> None:
        super().__init__()
        weight = conv.weight.detach().to(dtype)
        self.weight: Tensor | None = weight.clone(memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype).clone()
        self.border: list[int] = []
        self.padding: Any = conv.padding
        if conv.padding_mode != "zeros":  # as Conv2d does: pad first, then convolve without padding
            self.border, self.padding = list(conv._reversed_padding_repeated_twice), (0, 0)
        self.mode = conv.padding_mode
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.relu = relu
        self.packed: Tensor | None = None
        self.winograd = False
        self.full = conv.weight.detach()
        self.packable = (
            dtype in (torch.float32, torch.bfloat16)
            and weight.device.type == "cpu"
            and not isinstance(conv.padding, str)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.border:
            x = F.pad(x, self.border, mode=self.mode)
        if self.packable and self.packed is None:
            self._pack(x)
        if self.winograd:
            return ops.winograd_conv2d(x, self.packed, self.wbias, padding=tuple(self.padding), relu=self.relu)
        if self.packed is None:
            assert self.weight is not None
            options = (self.bias, self.stride, self.padding, self.dilation, self.groups)
            y = F.conv2d(x, self.weight, *options)
            return F.relu_(y) if self.relu else y
        attribute = "relu" if self.relu else "none"
        options = (self.padding, self.stride, self.dilation, self.groups, attribute, [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *options)

    def _pack(self, x: Tensor) -> None:
        import os
        w = self.weight
        spec = os.environ.get("WINO", "")
        if spec and w.shape[2:] == (3, 3) and tuple(self.stride) == (1, 1) and tuple(self.dilation) == (1, 1) and self.groups == 1:
            tile, dt = eval(spec)(x.size(0), w.size(1), w.size(0), x.size(2), x.size(3), w.dtype) or (None, None)
            if tile:
                self.packed = ops.winograd_weight(self.full, tile, dt)
                self.winograd = True
                self.weight = None
                self.wbias = torch.zeros(w.size(0)) if self.bias is None else self.bias.float()
                return
        try:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
            )
        except (AttributeError, RuntimeError):
            self.packable = False
        else:
            self.weight = None


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
        if type(module) is nn.Conv2d:
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
