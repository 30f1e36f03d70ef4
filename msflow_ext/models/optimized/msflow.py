"""Optimized head of MSFlow, see :mod:`msflow_ext.models.optimized.head`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msflow_ext import ops
from msflow_ext.models.conv.packed import PackedConv2d
from msflow_ext.models.optimized.head import (
    Coupling,
    OptimizedFlow,
    OptimizedHead,
    each_scale,
    total,
)
from msflow_ext.models.positional_encoding import positional_encoding
from msflow_ext.ops import accumulation_dtype
from msflow_ext.ops._backend import is_transformed


class OptimizedMSFlowHead(OptimizedHead):
    """Copy of an :class:`~msflow_ext.MSFlowHead` for inference, with the same inputs and outputs.

    Everything that does not depend on the image is computed once: the condition's share of each first convolution, the
    global scales, and the packed weights. The fusion flow's permutations are folded into the steps before it.

    Args:
        head: the original, which does not change.
        dtype: dtype of convolutions and of the state between them. Default: that of the weights.
    """

    fusion: Any
    clamp: float

    def _pack(self) -> _Packed:
        perms = self.fusion.perms()
        return _Packed(
            [_optimized(flow, p, self.dtype) for flow, p in zip(self.flows, perms, strict=True)],
            _OptimizedCrossScale(self.fusion.subnet_1, self.dtype),
            _OptimizedCrossScale(self.fusion.subnet_2, self.dtype),
        )

    def run(
        self, features: Sequence[Tensor], couple: Coupling, end: Coupling
    ) -> tuple[list[Tensor], Tensor | None]:
        packed: _Packed = self.packed()
        results = each_scale(lambda flow, x: flow(x, couple, couple), packed.flows, features)
        halves = [(x1, x2) for x1, x2, _ in results]
        log_dets = [log_det for _, _, log_det in results]
        options: Any = {"clamp": self.clamp, "clamp_form": "atan"}
        found, y1 = [], []
        for (x1, _), a in zip(halves, packed.subnet_2([x2 for _, x2 in halves]), strict=True):
            _, y, log_det = couple(x1[:, :0], x1, a, **options)
            y1.append(y)
            log_dets.append(log_det)
        for y, (_, x2), a in zip(y1, halves, packed.subnet_1(y1), strict=True):
            result, log_det = end(y, x2, a, limit=self.fusion.limit, **options)
            found.append(result)
            log_dets.append(log_det)
        return found, total(log_dets)


@dataclass(frozen=True)
class _Packed:
    flows: list[OptimizedFlow]
    subnet_1: _OptimizedCrossScale
    subnet_2: _OptimizedCrossScale


def _optimized(flow: Any, perm: Tensor, dtype: torch.dtype) -> OptimizedFlow:
    subnets = [_OptimizedSubnet(step.subnet, flow.cond_channels, dtype) for step in flow.steps]
    return OptimizedFlow(flow, subnets, dtype, then=perm)


class _OptimizedSubnet:
    def __init__(self, subnet: Any, cond_channels: int, dtype: torch.dtype) -> None:
        self.cond_channels = cond_channels
        self.conv_cond = subnet.conv_cond
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.conv_x = PackedConv2d(subnet.conv_x, dtype)
        self.norm = _vectors(subnet.norm, dtype)
        self.conv_out = PackedConv2d(subnet.conv_out, dtype)
        self.accumulation = accumulation_dtype(dtype)

    def __call__(self, x1: Tensor) -> Tensor:
        height, width = x1.shape[2:]
        # A tensor of a graph, or a fake one, must not be cached.
        if is_transformed(x1, self.conv_cond.weight):
            bias_map = self._made_map(height, width)
        else:
            bias_map = self._map(height, width)
        return self.conv_out(ops.channel_norm(self.conv_x(x1), *self.norm, bias_map))

    def _map(self, height: int, width: int) -> Tensor:
        """Return the condition's share of the first convolution, computed once per size."""
        if (height, width) not in self.maps:
            self.maps[height, width] = self._made_map(height, width)
        return self.maps[height, width]

    def _made_map(self, height: int, width: int) -> Tensor:
        weight = self.conv_cond.weight
        encoding = positional_encoding(self.cond_channels, height, width).to(weight)
        bias_map = self.conv_cond(encoding).to(self.accumulation)
        return bias_map.contiguous(memory_format=torch.channels_last)


class _OptimizedCrossScale:
    def __init__(self, subnet: Any, dtype: torch.dtype) -> None:
        self.channels = subnet.channels
        self.conv1, self.conv2 = (
            PackedConv2d(subnet.conv1, dtype),
            PackedConv2d(subnet.conv2, dtype, activation="relu"),
        )
        self.norm = _vectors(subnet.norm, dtype)
        self.conv_out = [PackedConv2d(conv, dtype) for conv in subnet.conv_out]

    def __call__(self, x: Sequence[Tensor]) -> list[Tensor]:
        size = min(((t.size(2), t.size(3)) for t in x), key=math.prod)
        mixed = ops.pool_and_concatenate(x, size)
        mixed = self.conv2(ops.channel_norm(self.conv1(mixed), *self.norm))
        return [
            conv(ops.upsample_and_add(t, m))
            for t, m, conv in zip(x, mixed.split(self.channels, 1), self.conv_out, strict=True)
        ]


def _vectors(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(dtype)
    return norm.weight.detach().to(dtype).clone(), norm.bias.detach().to(dtype).clone()
